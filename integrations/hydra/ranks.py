"""One run directory for all ranks, with a log per rank: ``tp_embed/ranks`` in the defaults list of
an app.

Hydra knows nothing of ranks. Each rank would name its directory by its own clock, and all would
write the same files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from tp_embed.launch.environment import find_place

from .run_start import close_server, run_start

# Interpolations that ranks agree on. Their values are the same in all jobs of a sweep.
_AGREED = re.compile(r"\$\{\s*(?:now|tp_embed\.run_id)\s*:[^{}]*\}")


class RanksCallback(Callback):
    """Makes Hydra's ``${now:}`` the same on all ranks, and saves the resolved config once."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _agree()
        # Before a sweep creates its directories, Hydra registers its own `now`, but all jobs keep
        # resolved values.
        OmegaConf.get_cache(config).pop("now", None)
        for text in {*_AGREED.findall(json.dumps(OmegaConf.to_container(config), default=str))}:
            _ = OmegaConf.create({"value": text}, parent=config).value

    on_multirun_start = on_run_start

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        _agree()
        if find_place().rank == 0:
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            OmegaConf.copy_cache(config, own)
            path = Path(config.hydra.runtime.output_dir) / "config.yaml"
            OmegaConf.save(own, path, resolve=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        close_server()


def register_resolvers() -> None:
    """Registers our resolvers with OmegaConf:

    - ``${tp_embed.run_id:}``: the id of the run, the same on all ranks.
    - ``${tp_embed.rank:5}``: the rank of this process, here with five digits.
    - ``${tp_embed.on_rank_0:A,B}``: A on rank 0, B (or null) on the others.
    """
    OmegaConf.register_new_resolver("tp_embed.run_id", _run_id, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("tp_embed.rank", _rank, replace=True)
    OmegaConf.register_new_resolver("tp_embed.on_rank_0", _on_rank_0, replace=True)


def _now(pattern: str) -> str:
    return run_start().time.strftime(pattern)


def _run_id() -> str:
    return run_start().id


def _rank(digits: int = 1) -> str:
    return f"{find_place().rank:0{digits}d}"


def _on_rank_0(value: Any, other: Any = None) -> Any:
    return value if find_place().rank == 0 else other


def _agree() -> None:
    try:
        run_start()
    except Exception as e:
        # Hydra turns exceptions of callbacks into warnings; ranks would go on, each on its own.
        raise SystemExit(f"{type(e).__name__}: {e}") from e
    OmegaConf.register_new_resolver("now", _now, use_cache=True, replace=True)


register_resolvers()  # For jobs on other machines, which import this module for the callback.
