"""``hydra.main`` for programs that a launcher starts on several ranks."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, MutableSequence
from enum import Enum
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tp_embed.launch.environment import find_place

from .logs import log_failure


def main(
    config_path: str | None = None, config_name: str | None = None, version_base: str | None = "1.3"
) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """:func:`hydra.main`, with the same arguments, for any launcher.

    - Removes ``--local_rank``, which ``deepspeed`` adds to the arguments and Hydra refuses.
    - Sets the variables that ``deepspeed.init_distributed()`` reads, if Open MPI, Slurm or no
      launcher started the process (see :meth:`tp_embed.launch.environment.Place.export`).
    - Writes an exception that ends a job to the rank's log. With several ranks, it ends the sweep
      too, and a running watchdog reports it to the other ranks.
    - Lists the valid keys after an error in the config.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def job(config: DictConfig) -> Any:
            place = find_place()
            place.export()
            try:
                with log_failure():
                    return function(config)
            except Exception as e:
                if watchdog := sys.modules.get("tp_embed.watchdog"):
                    # The other ranks wait for this one, and Hydra ends it without an error.
                    watchdog.Watchdog.report(e)
                # Not set if the function was called with a config.
                in_sweep = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
                if place.size > 1 and in_sweep:
                    # Hydra would start the next job, while the other ranks wait in this one.
                    traceback.print_exc()
                    raise SystemExit(1) from None
                raise

        app = hydra.main(
            config_path=config_path, config_name=config_name, version_base=version_base
        )(job)

        @functools.wraps(function)
        def run(config: DictConfig | None = None) -> Any:
            if config is not None:
                return app(config)
            strip_local_rank(sys.argv)
            try:
                return app()
            except SystemExit as e:
                # Hydra has printed the error, and exits while it handles it.
                if help_text := explain(e.__context__):
                    print(help_text, file=sys.stderr)
                raise

        return run

    return decorate


def strip_local_rank(argv: MutableSequence[str]) -> None:
    """Removes ``--local_rank=N`` from the arguments of a program, in place. Sets ``LOCAL_RANK`` to
    N unless it is set."""
    kept: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value or next(arguments, ""))
        else:
            kept.append(argument)
    argv[:] = kept


def explain(error: BaseException | None) -> str | None:
    """Returns help on a config error that Hydra does not give: the valid keys with their types, or
    how to install a missing plugin. ``None`` if there is nothing to add."""
    if isinstance(error, MissingConfigException):
        name = str(error.missing_cfg_file)
        is_plugin = name.startswith("hydra/launcher/submitit_")
        return f"{name} is a plugin of Hydra: pip install 'tp-embed[slurm]'" if is_plugin else None
    cause = None if error is None else error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        return None
    node, wrong = cause.parent_node, str(cause.key)
    if not isinstance(node, DictConfig) or cause.full_key is None:
        return None
    keys = [str(key) for key in node if not str(key).startswith("_") and key != "hydra"]
    parent = cause.full_key.rpartition(".")[0]
    where = f"`{parent}`" if parent else "The config"
    if not keys:
        return f"{where} has no keys that can be set." if node._is_typed() else None
    text = f"{where} has the keys {', '.join(key + _type_of(node, key) for key in keys)}."
    near = [] if wrong in keys else difflib.get_close_matches(wrong, keys, n=1)
    return f"{text} Did you mean `{near[0]}`?" if near else text


def _type_of(config: DictConfig, key: str) -> str:
    """Returns the type of a key from its schema, as an annotation, or ``""``."""
    node: Any = config._get_node(key)
    kind = node._metadata.ref_type
    if kind is Any:
        return ""
    name = kind.__name__ if isinstance(kind, type) else re.sub(r"[a-z_.]+[.]", "", str(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        name = " | ".join(choice.name for choice in kind)
    return f": {name} | None" if node._metadata.optional else f": {name}"
