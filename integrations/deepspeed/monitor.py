"""Monitors the tables of a DeepSpeed engine through DeepSpeed's own monitor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from tp_embed.gang import Gang
from tp_embed.monitor.tables import Monitor, Writer

from .layout import has_mixed_up_masters
from .private import bwc_tensor_model_parallel_world_size, local_gradient, loss_scale, wrap_step
from .table_optimizers import own_tables_of
from .timing import time_collectives


class EngineMonitor(Monitor):
    """A :class:`Monitor` for an engine. Writes to the backends in the DeepSpeed config
    (``"tensorboard"``, ``"csv_monitor"``, ``"wandb"``, ``"comet"``), next to DeepSpeed's figures::

        engine, *_ = initialize(model=model, config=config)
        monitor = EngineMonitor(engine)

    Works at each ZeRO stage, with gradient accumulation, and in a pipeline. Takes the loss from the
    model's output (the output itself, its first item, or ``.loss``); if the loss is computed
    outside, pass it: ``monitor.record(loss=loss)``. Norms are of the averaged gradient before
    clipping.

    Also adds the timers of :func:`time_collectives`.

    :param engine: returned by ``initialize``; all ranks must create the monitor at the same place.
    :param writer: also gets the figures; see :class:`Monitor` for this and the other arguments.
    :param every: defaults to DeepSpeed's ``"steps_per_print"``, or 10 if DeepSpeed never prints.
    :raises ValueError: the config sets ``round_robin_gradients``, where DeepSpeed returns gradients
        of the wrong Parameter.
    """

    prefix = "Train/Samples/"

    def __init__(
        self,
        engine: Any,
        writer: Writer | None = None,
        *,
        every: int | None = None,
        directory: Path | str | None = None,
        about: Mapping[str, Any] | None = None,
        timeout: timedelta = timedelta(minutes=2),
    ) -> None:
        if has_mixed_up_masters(engine):
            raise ValueError(
                "`engine` must have `zero_optimization.round_robin_gradients` off, since with it "
                "DeepSpeed returns the gradient of another Parameter for a table."
            )
        printed = engine.steps_per_print()
        if every is None:
            every = 10 if printed is None or math.isinf(printed) else int(printed)
        self._engine = engine
        about = {
            "engine": {
                "zero_stage": engine.zero_optimization_stage(),
                "tp_size": _tp_size(engine),
                "dp_size": engine.dp_world_size,
                "dtype": str(next(engine.module.parameters()).dtype).removeprefix("torch."),
            },
            "deepspeed_config": engine.config,
            "sharding": str(getattr(engine, "tp_embed_report", "")),
            **(about or {}),
        }
        super().__init__(
            engine.module,
            None,
            writer,
            every=every,
            directory=directory,
            about=about,
            device=engine.device,  # Parameters may be offloaded.
            timeout=timeout,
        )
        time_collectives(engine)
        self._unwatch = wrap_step(engine, self._watched)

    def _watched(self, take_step: Callable[..., None]) -> Callable[..., None]:
        engine = self._engine

        def take_step_watched(*args: Any, **kwargs: Any) -> None:
            total = getattr(engine, "total_loss", None)  # From a pipeline's last stage.
            if isinstance(total, Tensor):
                self.record(loss=total / engine.gradient_accumulation_steps())
            self._before_update()
            take_step(*args, **kwargs)
            self._after_update()

        return take_step_watched

    def close(self) -> None:
        super().close()
        self._unwatch()

    def _steps_done(self) -> int:
        return int(self._engine.global_steps)

    def _abscissa(self) -> int:
        return int(self._engine.global_samples)

    def _gradient(self, parameter: Parameter) -> tuple[Tensor | None, int]:
        own = own_tables_of(self._engine)
        if own is not None and parameter in own:
            return own.gradients().get(parameter), 1
        return local_gradient(parameter)

    def _more_gangs(self) -> Sequence[Gang]:
        own = own_tables_of(self._engine)
        return () if own is None else (own.replicas,)

    def _tp_size(self) -> int:
        return _tp_size(self._engine)  # Tables may be whole where other layers are cut.

    def _loss_scale(self) -> float:
        return loss_scale(self._engine)

    def _write(self, events: list[tuple[str, float, int]]) -> None:
        super()._write(events)
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events(events)


def _tp_size(engine: Any) -> int:
    if engine.autotp_size() or engine.mpu is None:
        return int(engine.autotp_size()) or 1
    return int(bwc_tensor_model_parallel_world_size(engine.mpu))
