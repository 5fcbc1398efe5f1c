"""Our collectives in DeepSpeed's own measurements: `comms_logger` and wall-clock breakdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import Tensor

from tp_embed.monitor.traffic import gangs_of

from .private import comm

# DeepSpeed's names of the operations, which it computes bandwidths by.
_DEEPSPEED_NAMES = {
    "all_gather": "all_gather_into_tensor",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all_single",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "broadcast_objects": "broadcast_object_list",
    "reduce_scatter": "reduce_scatter_tensor",
}


def log_collective(operation: str, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Logs a collective as ``tp_embed.OPERATION`` if the section ``"comms_logger"`` of the config
    asks for it, by ``prof_all`` or by this name in ``prof_ops``. Like DeepSpeed, logs the size of
    this rank's input, and synchronizes the accelerator after each call."""
    logger = comm.comms_logger
    name = f"tp_embed.{operation}"
    if not logger.enabled or not (logger.prof_all or name in logger.prof_ops):
        return nullcontext()
    return _log(logger, _DEEPSPEED_NAMES[operation], name, sum(t.nbytes for t in tensors))


@contextmanager
def _log(logger: Any, operation: str, name: str, num_bytes: int) -> Iterator[None]:
    timer = comm.timers(name)
    timer.start()
    try:
        yield
        get_accelerator().synchronize()
    finally:
        timer.stop()
        milliseconds = timer.elapsed()
    logger.append(operation, name, milliseconds, num_bytes)


def time_collectives(engine: Any) -> None:
    """Adds a timer ``tp_embed.OPERATION`` for each kind of collective of the engine's tables, if
    the config has ``"wall_clock_breakdown": true``. DeepSpeed logs the timers with each step and
    returns them from ``engine.get_wall_clock_timers()``. Idempotent.
    """
    if not engine.wall_clock_breakdown() or hasattr(engine, "tp_embed_timers"):
        return
    timers, names = engine.timers, engine.engine_timers.global_timers

    @contextmanager
    def measure(operation: str, tensors: Sequence[Tensor]) -> Iterator[None]:
        name = f"tp_embed.{operation}"
        if name not in names:
            names.append(name)
        timers(name).start()
        try:
            yield
        finally:
            timers(name).stop()

    gangs = gangs_of(engine.module)
    if own_tables := vars(engine).get("tp_embed_tables"):
        gangs.append(own_tables.replicas)
    engine.tp_embed_timers = [gang.register_collective_hook(measure) for gang in gangs]
