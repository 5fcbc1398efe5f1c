"""``tp-embed plan`` as a Hydra app, for the choices of a training run.

    python -m tp_embed.integrations.hydra.plan model=llama3_8b deepspeed=zero2 tp_size=8 dp_size=4

The config is ``plan.yaml``. The exit codes are the same as for the command.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from tp_embed import cli

from .command_app import run_command
from .options import table_options
from .registration import register_schemas
from .schema import DataConfig, EmbeddingConfig, HeadConfig, ModelConfig


class Device(Enum):
    """The device to plan for."""

    cuda = "cuda"
    cpu = "cpu"


@dataclass
class PlanConfig:
    """The choices of a run in the groups of ``train.yaml``, and the machines."""

    tp_size: int = MISSING
    dp_size: int = MISSING
    table: str | None = MISSING
    tokens: int = MISSING
    unique_share: float | None = MISSING
    block_unique_share: float | None = MISSING
    owner_share: float | None = MISSING
    device: Device = MISSING
    memory: float | None = MISSING
    bandwidth: float | None = MISSING
    latency: float = MISSING
    gpus_per_node: int | None = MISSING
    inter_bandwidth: float | None = MISSING
    inter_latency: float | None = MISSING
    chart: str | None = MISSING
    json: bool = MISSING
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: dict[str, Any] = MISSING


def register_schema() -> None:
    """Registers the schema and the group schemas with Hydra."""
    register_schemas()
    ConfigStore.instance().store(name="tp_embed_plan", node=PlanConfig, provider="tp_embed")


# Keys with the same name and meaning in both.
_SAME = (
    "json",
    "table",
    "tokens",
    "unique_share",
    "block_unique_share",
    "owner_share",
    "memory",
    "bandwidth",
    "latency",
    "gpus_per_node",
    "inter_bandwidth",
    "inter_latency",
    "chart",
)


def options(config: DictConfig) -> dict[str, Any]:
    """Returns the options of ``tp-embed plan``, by their names in its parser."""
    model, head, deepspeed = config.model, config.head, config.deepspeed
    section = {
        "strategy": config.embedding.strategy.value,
        "rules": {name: chosen.value for name, chosen in config.embedding.rules.items()},
        "placement": config.embedding.placement.value,
        "tables": table_options(config),
        "tie_head": head.tie_head,
    }
    optimizer = deepspeed.optimizer.type.lower()
    if optimizer == "sgd" and deepspeed.optimizer.params.momentum:
        optimizer = "momentum"
    low = [name for name in ("bf16", "fp16") if OmegaConf.select(deepspeed, f"{name}.enabled")]
    return {
        **{name: config[name] for name in _SAME},
        "dedup": {True: "always", False: "never"}.get(config.embedding.dedup.value, "auto"),
        "device": config.device.value,
        "output": "sequence" if config.embedding.output.value == "sequence" else "replicated",
        "hf_config": None,
        "vocab_size": model.vocab_size or config.data.vocab_size,
        "embed_dim": model.hidden_size,
        "tied": model.tie_word_embeddings,
        "head": True,
        "shard_head": head.shard_head,
        "config": {"tp_embed": section},
        **dict.fromkeys(("strategy", "placement", "table_optimizer", "table_decay")),
        "shard_logits": head.shard_logits,
        "fuse_loss": bool(head.fuse_loss.value),
        "tp": config.tp_size,
        "dp": config.dp_size,
        "zero_stage": deepspeed.zero_optimization.stage,
        "dtype": low[0] if low else "fp32",
        "grad_dtype": OmegaConf.select(deepspeed, "data_types.grad_accum_dtype"),
        "optimizer": optimizer,
        "accumulation_steps": deepspeed.gradient_accumulation_steps,
        "sparse": bool(config.embedding.sparse),
    }


def run(config: DictConfig) -> int:
    """Plans for ``config``.

    :returns: the exit code.
    """
    return cli.run("plan", options(config))


def main() -> int:
    """Runs the app with the overrides of the command line.

    :returns: the exit code.
    """
    register_schema()
    return run_command("plan", run)


if __name__ == "__main__":
    raise SystemExit(main())
