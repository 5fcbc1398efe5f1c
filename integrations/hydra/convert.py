"""``tp-embed convert`` as a Hydra app.

    python -m tp_embed.integrations.hydra.convert source=SRC output=DST to=hf tp=2

The config is ``convert.yaml``. Its keys are the options of the command, and the exit codes are the
same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from tp_embed import cli

from .command_app import run_command


@dataclass
class ConvertConfig:
    """The arguments of :func:`tp_embed.checkpoint.actions.convert`, and options for printing."""

    source: str = MISSING
    output: str = MISSING
    to: str = MISSING
    source_format: str | None = None
    tag: str | None = None
    rules: list[str] = field(default_factory=list)
    vocab_size: int | None = None
    optimizer_names: str | None = None
    allow_unsafe_pickle: bool = False
    weights_only: bool = False
    tp: int | None = None
    dim: str | None = None
    dtype: str | None = None
    nan: str = MISSING
    max_shard_size: str = MISSING
    hf_config: str | None = None
    zero_stage: int = MISSING
    dp: int = MISSING
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False
    verify: bool = False
    show_all: bool = False
    json: bool = False
    quiet: bool = False


def register_schema() -> None:
    """Registers the schema with Hydra."""
    ConfigStore.instance().store(name="tp_embed_convert", node=ConvertConfig, provider="tp_embed")


def run(config: DictConfig) -> int:
    """Converts a checkpoint as ``config`` says.

    :returns: the exit code.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        return cli.fail("usage", f"{missing} must be given, as KEY=VALUE.", cli.USAGE, config.json)
    return cli.run("convert", cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))


def main() -> int:
    """Runs the app with the overrides of the command line.

    :returns: the exit code.
    """
    register_schema()
    return run_command("convert", run)


if __name__ == "__main__":
    raise SystemExit(main())
