"""Monitors the tables of a model in training: gradients, ids, and the exchange between ranks."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.process_group import ProcessGroupGang
from tp_embed.nn.embedding import Embedding
from tp_embed.nn.gang_layer import GangLayer
from tp_embed.parameter.sharded import local

from .ranks import describe_rank, describe_run, meet
from .run_log import RunLog
from .traffic import Traffic, gangs_of

_OPERATIONS = ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter")
_TIMEOUT = timedelta(minutes=2)
_MOST_ROWS = 1000


class Writer(Protocol):
    """The interface of a ``torch.utils.tensorboard.SummaryWriter`` that a Monitor needs."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object: ...


@dataclass
class _Window:
    """A sampled step, from its first forward to the update."""

    traffic: Traffic
    started: float
    losses: list[Tensor] = field(default_factory=list)  # Returned by the model.
    given: list[Tensor] = field(default_factory=list)  # Given by the caller; takes precedence.
    values: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, list[Tensor]] = field(default_factory=dict)  # (2,): unique, all
    squares: dict[str, Tensor] = field(default_factory=dict)
    updated: dict[str, float] = field(default_factory=dict)


class Monitor:
    """Logs metrics of sampled steps in a plain torch training loop::

        monitor = Monitor(model, optimizer, SummaryWriter("runs/first"))

    The tags are ``train_loss``; ``grad_norm/TABLE``, the gradient norm of the whole table before
    the update; ``unique_ratio/TABLE``, unique ids over all ids of a batch; ``updated_rows/TABLE``,
    the rows of a row-sparse gradient, which an optimizer of :mod:`tp_embed.optim` updates;
    ``exchange_bytes/OPERATION`` and ``exchange_ms/OPERATION``, bytes sent and time spent by one
    rank in collectives of the tables' gangs, averaged over ranks, and their sums; ``step_ms``,
    ``tokens_per_second`` and ``memory_mib``, the highest peak of any rank.

    All ranks of the job must make one, at the same place of the script; the first rank writes. They
    must update, or skip an update, together. A sampled step costs an all-gather of a few numbers
    over all ranks, a synchronisation before and after it, and a sort of the ids; other steps cost
    next to nothing.

    :param model: its sharded tables and heads are monitored, and other embeddings.
    :param optimizer: its update ends the step. By then, gradients must cover the whole batch: with
        ``DistributedDataParallel``, or with one process per shard.
    :param writer: gets the metrics, on the first rank; writers of other ranks are unused.
    :param every: samples the steps whose number, counted from 1, is a multiple of it.
    :param directory: the first rank appends rows to `monitor.jsonl` there, for
        :func:`tp_embed.monitor.report.write_report`.
    :param about: anything to log with the run: its config, the report of ``shard_embeddings``.
    :param device: where ranks exchange metrics, and whose memory is monitored; if ``None``, the
        device of the model's first Parameter.
    :param timeout: how long to wait for other ranks to make their monitors.
    :raises GangError: a rank has not made its monitor in time.
    """

    prefix = "Train/Steps/"

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer | None = None,
        writer: Writer | None = None,
        *,
        every: int = 10,
        directory: Path | str | None = None,
        about: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        timeout: timedelta = _TIMEOUT,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be greater than or equal to 1, but is {every} instead.")
        self.every = every
        self.rows: list[dict[str, Any]] = []  # The latest rows, on the first rank.
        self._writer = writer
        self._window: _Window | None = None
        self._step = 0
        self._tables = watched_tables(model)
        self._gangs = [*gangs_of(model), *self._more_gangs()]
        self._sharing = gangs_of(model, sharing_ids=True)
        if device is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._all = _all_ranks(device)
        own = {name: module for name, (module, _) in self._tables.items()}
        infos = meet(self._all, describe_rank(own, device), timeout)
        self._names = list(dict.fromkeys(name for info in infos for name in info["tables"]))
        # How many ranks hold each table, over its gang, data parallelism and pipeline stages.
        self._holders = {n: sum(n in info["tables"] for info in infos) for n in self._names}
        self._log: RunLog | None = None
        if directory is not None and self._all.rank == 0:
            self._log = RunLog(directory)
            self._log.start(describe_run(infos, every, about or {}))
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        for name, (module, _) in self._tables.items():
            if isinstance(module, nn.Embedding | Embedding):
                self._handles.append(
                    module.register_forward_pre_hook(self._id_hook(name), with_kwargs=True)
                )
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(lambda *_: self._before_update()),
                optimizer.register_step_post_hook(lambda *_: self._after_update()),
            ]

    def record(self, **values: Any) -> None:
        """Adds custom metrics to this step, if it is sampled: numbers, or tensors of one item. Call
        it before the update. ``loss``, of this rank's batch or micro batch, replaces the loss that
        the model returns; of others, the first rank's values are logged."""
        if self._window is not None:
            loss = values.pop("loss", None)
            if loss is not None:
                self._window.given.append(torch.as_tensor(loss).detach().reshape(()))
            self._window.values |= values

    def close(self) -> None:
        """Removes all hooks. The writer stays open."""
        for handle in self._handles:
            handle.remove()
        if self._window is not None:
            self._window.traffic.close()
            self._window = None

    # Overridden for frameworks.

    def _steps_done(self) -> int:
        return self._step

    def _abscissa(self) -> int:
        """Returns the x-coordinate of metrics."""
        return self._step

    def _gradient(self, parameter: Parameter) -> tuple[Tensor | None, int]:
        """Returns this rank's piece of the gradient of ``parameter``, or ``None``, and the number
        of data-parallel ranks that it is cut over."""
        return parameter.grad, 1

    def _more_gangs(self) -> Sequence[Gang]:
        """Returns gangs that exchange gradients of tables, beside the gangs of their layers."""
        return ()

    def _tp_size(self) -> int:
        """Returns the number of ranks that share a batch."""
        return max((gang.size for gang in self._sharing), default=1)

    def _loss_scale(self) -> float:
        """Returns the factor that gradients are scaled by."""
        return 1.0

    def _write(self, events: list[tuple[str, float, int]]) -> None:
        if self._writer is not None:
            for tag, value, at in events:
                self._writer.add_scalar(tag, value, at)

    # In the order of a step.

    def _before_forward(self, model: Module, args: Any) -> None:
        is_sampled = (self._steps_done() + 1) % self.every == 0
        if self._window is None and is_sampled and _is_training(model):
            _synchronize(self._all.device)
            self._window = _Window(Traffic(*self._gangs), time.perf_counter())

    def _after_forward(self, model: Module, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs.get("num_items_in_batch") is not None:
            return  # transformers returns a partial loss, to sum over micro batches and ranks.
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = output[0] if isinstance(output, tuple) and output else output
        is_loss = isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()
        if self._window is not None and is_loss and _is_training(model):
            self._window.losses.append(loss.detach())

    def _id_hook(self, name: str) -> Callable[[Module, Any, dict[str, Any]], None]:
        def count(module: Module, args: Any, kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if self._window is not None and tensors and _is_training(module):
                self._window.ids.setdefault(name, []).append(count_unique(tensors[0]))

        return count

    @torch.no_grad()
    def _before_update(self) -> None:
        if self._window is None:
            return
        for name, (module, parameter) in self._tables.items():
            gradient, pieces = self._gradient(parameter)
            if gradient is None:
                continue
            # Without `local`, the norm would already be reduced over the gang.
            gradient = local(gradient)
            size = module.gang.size if isinstance(module, GangLayer) else 1
            copies = self._holders[name] / (size * pieces)
            if gradient.is_sparse:
                gradient = gradient.coalesce().values()
                # Each rank has columns of all rows, or all columns of its rows.
                alike = size if getattr(module, "shard_dim", 0) == 1 else 1
                self._window.updated[name] = len(gradient) / (copies * alike)
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).double()
            self._window.squares[name] = (norm / self._loss_scale()) ** 2 / copies

    @torch.no_grad()
    def _after_update(self) -> None:
        self._step += 1
        window, self._window = self._window, None
        if window is None:
            return
        window.traffic.close()
        device = self._all.device
        _synchronize(device)
        seconds = time.perf_counter() - window.started
        losses = window.given or window.losses
        figures: list[Any] = [len(losses), sum(losses), seconds, _peak_memory(device)]
        for name in self._names:
            counts: Any = sum(window.ids[name]) if name in window.ids else (0, 0)
            figures += [window.squares.get(name, 0.0), *counts]
            figures += [window.updated.get(name, 0.0), float(name in window.updated)]
        traffic = window.traffic.by_operation()
        for operation in _OPERATIONS:
            found = traffic.get(operation)
            figures += [found.calls, found.bytes_sent, found.seconds] if found else [0, 0, 0]
        own = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(device) for x in figures])
        every_rank = own.new_empty((self._all.size, len(own)))
        self._all.all_gather(every_rank, own)
        if self._all.rank == 0:
            row = self._row(every_rank.cpu())
            row["values"] = {k: float(v) for k, v in window.values.items()}
            self.rows = [*self.rows[1 - _MOST_ROWS :], row]
            if self._log is not None:
                self._log.add(row)
            self._write(self._events(row))

    def _row(self, figures: Tensor) -> dict[str, Any]:
        """Reduces the figures of all ranks to a row. *Shape:* (ranks, figures)."""
        sums = iter(figures.sum(0).tolist())
        num_losses, loss, seconds, _ = (next(sums) for _ in range(4))
        by_table = {name: [next(sums) for _ in range(5)] for name in self._names}
        by_operation = {op: [next(sums) / len(figures) for _ in range(3)] for op in _OPERATIONS}
        tokens = max((all_ids for _, _, all_ids, *_ in by_table.values()), default=0.0)
        tokens /= self._tp_size()
        seconds /= len(figures)
        return {
            "step": self._steps_done(),
            "every": self.every,
            "at": self._abscissa(),
            "time": time.time(),
            "loss": loss / num_losses if num_losses else None,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if tokens else None,
            "memory": figures[:, 3].tolist(),
            "grad_norm": {name: square**0.5 for name, (square, *_) in by_table.items()},
            "unique_ratio": {
                name: unique / all_ids
                for name, (_, unique, all_ids, *_) in by_table.items()
                if all_ids
            },
            "updated_rows": {
                name: rows for name, (*_, rows, is_sparse) in by_table.items() if is_sparse
            },
            "traffic": {
                operation: {"calls": calls, "bytes": num_bytes, "seconds": duration}
                for operation, (calls, num_bytes, duration) in by_operation.items()
                if calls
            },
        }

    def _events(self, row: dict[str, Any]) -> list[tuple[str, float, int]]:
        traffic = row["traffic"]
        figures: dict[str, float | None] = {
            "train_loss": row["loss"],
            **{f"tp_embed/grad_norm/{name}": x for name, x in row["grad_norm"].items()},
            **{f"tp_embed/unique_ratio/{name}": x for name, x in row["unique_ratio"].items()},
            **{f"tp_embed/updated_rows/{name}": x for name, x in row["updated_rows"].items()},
            "tp_embed/exchange_bytes": sum(t["bytes"] for t in traffic.values()),
            "tp_embed/exchange_ms": 1000 * sum(t["seconds"] for t in traffic.values()),
            **{f"tp_embed/exchange_bytes/{op}": t["bytes"] for op, t in traffic.items()},
            **{f"tp_embed/exchange_ms/{op}": 1000 * t["seconds"] for op, t in traffic.items()},
            "tp_embed/step_ms": 1000 * row["seconds"],
            "tp_embed/tokens_per_second": row["tokens_per_second"],
            "tp_embed/memory_mib": max(row["memory"]) / 2**20,
            **row["values"],
        }
        return [(self.prefix + k, v, row["at"]) for k, v in figures.items() if v is not None]


def watched_tables(model: Module) -> dict[str, tuple[Module, Parameter]]:
    """Returns the embeddings of ``model``, ours and torch's, and our heads, by name, with their
    weight. Of modules that share a weight, returns the first."""
    tables: dict[str, tuple[Module, Parameter]] = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, GangLayer | nn.Embedding) or not weight.requires_grad:
            continue
        if all(weight is not other for _, other in tables.values()):
            tables[name or type(module).__name__] = module, weight
    return tables


def count_unique(ids: Tensor) -> Tensor:
    """Counts unique ``ids``, and all ``ids``, without the synchronisation of ``torch.unique``.
    *Shape:* :math:`(2)`, *dtype:* float64, on the device of ``ids``."""
    flat = ids.flatten()
    ordered = flat.sort().values
    unique = (ordered[1:] != ordered[:-1]).sum() + min(flat.numel(), 1)
    return torch.stack([unique, torch.full_like(unique, flat.numel())]).double()


def _is_training(module: Module) -> bool:
    """Returns false in evaluation, and in the first of the two forwards of a checkpoint."""
    return module.training and torch.is_grad_enabled()


def _all_ranks(device: torch.device) -> Gang:
    if dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroupGang(None, device)
    return FakeGang(device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_memory(device: torch.device) -> float:
    """Returns the peak memory of this process in bytes, on the device, or on the host for CPUs."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # In KiB on Linux.
    return float(torch.accelerator.max_memory_allocated(device))
