"""Trains tables with an optimizer of their own, in step with an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import log_dist
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.gang.process_group import ProcessGroupGang
from tp_embed.lookup.gradient import as_sparse, keep_coalesced
from tp_embed.optim import RowOptimizer
from tp_embed.optim.rows import rows_of, sum_rows
from tp_embed.parameter.norms import whole_norms
from tp_embed.parameter.sharded import local, unguarded

from .config import SECTION
from .mapped_tables import Snapshots
from .own_tables import OwnTable
from .private import join_norm, loss_scale, wrap_step
from .table_checkpoints import TableCheckpoints
from .timing import log_collective


class TableOptimizers:
    """The optimizers of tables that the engine's own optimizer does not train, as
    ``engine.tp_embed_tables``.

    Before a step of the engine it averages the gradients of the tables over the data-parallel
    ranks, which all-gather their rows and row numbers and sum them in the order of the ranks. The
    norm of these gradients is part of the engine's norm, and they are unscaled and clipped with it.
    After the step, unless the engine has skipped it, the tables step too. A checkpoint of the
    engine has their states.

    Over DP data-parallel ranks with U distinct rows each, a rank sends (DP-1) U (4 E + 8) bytes for
    a table, and for all tables of a gang 4 bytes each to compute the norm.

    Tables in memory-mapped files are by their names in ``mapped``, for
    :meth:`~tp_embed.MappedTable.prefetch`; checkpoints of the engine have snapshots of them.

    :param optimizers: the optimizers by the names of tables. Set the learning rate of one that was
        given ``lr`` in its ``param_groups``; others follow the engine.

    ``replicas`` is the gang of data-parallel ranks, which exchange gradients over it.
    """

    optimizers: dict[str, RowOptimizer]
    replicas: ProcessGroupGang

    def __init__(self, engine: Any, tables: Iterable[OwnTable]) -> None:
        self._engine, self._tables = engine, list(tables)
        self.optimizers = {table.name: table.optimizer for table in self._tables}
        self.mapped = {t.name: t.mapped for t in self._tables if t.mapped is not None}
        self._grads: dict[Tensor, Tensor] | None = None
        self._collected: dict[Tensor, list[Tensor]] = {}
        self._own_norm = self._total_norm = torch.zeros(())
        self._check()
        self.replicas = ProcessGroupGang(engine.seq_data_parallel_group, engine.device)
        self.replicas.register_collective_hook(log_collective)
        self._copied = {table.name: self._is_copied(table) for table in self._tables}
        for table in self._tables:
            if self._copied[table.name]:  # DeepSpeed does so for Parameters.
                self.replicas.broadcast(local(table.weight))
            keep_coalesced(table.weight)
            table.weight.register_post_accumulate_grad_hook(self._collect)
        join_norm(engine, lambda: self._own_norm, self._note_norm)
        wrap_step(engine, self._with_tables)
        in_memory = [table for table in self._tables if table.name not in self.mapped]
        rank, size = self.replicas.rank, self.replicas.size
        copies = [(rank, size) if self._copied[table.name] else (0, 1) for table in in_memory]
        self.checkpoints = TableCheckpoints(engine, in_memory, copies, Snapshots(self._tables))
        self._wrap_zero_grad()

    def __contains__(self, weight: object) -> bool:
        return any(table.weight is weight for table in self._tables)

    def optimizer_of(self, weight: Tensor) -> RowOptimizer:
        """Returns the optimizer of a table, by its weight."""
        return next(table.optimizer for table in self._tables if table.weight is weight)

    def _check(self) -> None:
        engine = self._engine
        if engine.sequence_parallel_size > 1:
            raise ValueError(
                "`sequence_parallel_size` must be 1 for tables with an optimizer of their own, but "
                f"is {engine.sequence_parallel_size} instead. Take them out of `tp_embed.tables`."
            )
        rates = engine.get_lr()
        following = [table.name for table in self._tables if table.follows]
        if following and len(set(rates)) > 1:
            raise ValueError(
                f"`lr` must be given in `tp_embed.tables` for {following}, since the engine's "
                f"parameter groups have several learning rates to follow: {rates}."
            )

    def _is_copied(self, table: OwnTable) -> bool:
        """Returns whether data-parallel ranks have copies of the same shard. Otherwise the table is
        sharded over them, and its gradient is averaged already."""
        replicas = set(self.replicas.global_ranks) - {dist.get_rank()}
        return replicas.isdisjoint(getattr(table.gang, "global_ranks", ()))

    def _collect(self, weight: Tensor) -> None:
        """Takes the gradient of a micro-batch, so that they are summed in fp32."""
        with unguarded():
            grad, weight.grad = weight.grad, None
        if grad is not None:
            self._collected.setdefault(weight, []).append(local(grad))

    def gradients(self) -> Mapping[Tensor, Tensor]:
        """Averages the gradients of this step over the data-parallel ranks, once. All ranks must
        call it, when the last micro-batch is done.

        :returns: the gradients by weight, row-sparse and in at least fp32, scaled by the loss
            scale; tables without a gradient on any rank are missing.
        """
        if self._grads is None:
            grads: dict[Tensor, Tensor] = {}
            for table in self._tables:
                if any(layer.weight is not table.weight for layer in table.layers):
                    raise ValueError(
                        f"The weight of '{table.name}' must stay the one that its optimizer "
                        "trains, but was replaced. Copy values into it: `weight.data.copy_()`."
                    )
                average = self._average(table)
                if average is not None:
                    grads[table.weight] = average
            self._grads = grads
        return self._grads

    def _average(self, table: OwnTable) -> Tensor | None:
        weight, replicas = local(table.weight), self.replicas
        grads = self._collected.pop(table.weight, [])
        rows, values = _sum(grads, weight)
        if replicas.size > 1 and self._copied[table.name]:
            counts = rows.new_empty(replicas.size)
            replicas.all_gather(counts, rows.new_tensor(len(rows) if grads else -1))
            if int(counts.max()) < 0:
                return None
            sizes = counts.clamp_(min=0).tolist()
            all_rows = rows.new_empty(sum(sizes))
            all_values = values.new_empty(sum(sizes), values.size(1))
            replicas.all_gather(all_rows, rows, sizes)
            replicas.all_gather(all_values, values.contiguous(), sizes)
            rows, values = sum_rows(all_rows, all_values)
            values.div_(replicas.size)
        elif not grads:
            return None
        return as_sparse(rows, values, len(weight))

    def _norm(self, grads: Mapping[Tensor, Tensor]) -> Tensor:
        by_gang: dict[Gang, list[Tensor]] = {}
        for table in self._tables:
            grad = grads.get(table.weight)
            values = torch.zeros(0) if grad is None else grad.values()
            by_gang.setdefault(table.gang, []).append(values)
        norms = [
            norm.to(self._engine.device, torch.float32)
            for gang, values in by_gang.items()
            for norm in whole_norms(values, gang, 2.0)
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _note_norm(self, total: Tensor) -> None:
        self._total_norm = total

    def _with_tables(self, take_step: Callable[..., None]) -> Callable[..., None]:
        engine = self._engine

        def take_step_with_tables(*args: Any, **kwargs: Any) -> None:
            if engine.global_steps == 0:
                self._warn_of_old_tables()
            grads, scale, rate = self.gradients(), loss_scale(engine), engine.get_lr()[0]
            self._own_norm = self._norm(grads)
            take_step(*args, **kwargs)
            self._grads = None
            if engine.was_step_applied():
                self._step(grads, scale, rate)

        return take_step_with_tables

    def _warn_of_old_tables(self) -> None:
        for name, mapped in self.mapped.items():
            if mapped.step:
                log_dist(
                    f"tp_embed: '{name}' in {mapped.path} is at step {mapped.step}, but the engine "
                    "at step 0: a new model trains with an old table. If an earlier run was "
                    "killed before its first checkpoint, delete the directory, or choose another "
                    f"`memory` in `{SECTION}.tables`. To go on, load a checkpoint.",
                    ranks=[0],
                    level=logging.WARNING,
                )

    def _step(self, grads: Mapping[Tensor, Tensor], scale: float, rate: float) -> None:
        engine = self._engine
        factor = torch.tensor(1.0 / scale)
        clip = float(getattr(engine.optimizer, "clip_grad", engine.gradient_clipping()))
        if clip > 0.0:
            factor = (clip / (self._total_norm / scale + 1e-6)).clamp(max=1.0) / scale
        for grad in grads.values():
            grad.values().mul_(factor.to(grad.values()))
        for table in self._tables:
            if table.follows:
                table.optimizer.param_groups[0]["lr"] = rate
            table.optimizer.step(grads=grads)

    def _wrap_zero_grad(self) -> None:
        zero_grad = self._engine.zero_grad

        def zero_all() -> None:
            zero_grad()
            self._grads = None
            self._collected.clear()

        self._engine.zero_grad = zero_all


def own_tables_of(engine: Any) -> TableOptimizers | None:
    """Returns the optimizers of the engine's tables that have their own, if there are any."""
    found: TableOptimizers | None = vars(engine).get("tp_embed_tables")
    return found


def _sum(grads: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct rows of gradients and their sums, in at least fp32."""
    parts = [rows_of(grad, weight) for grad in grads]
    if len(parts) == 1:
        return parts[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    no_rows = weight.new_empty(0, dtype=torch.long)
    no_values = weight.new_empty((0, weight.size(1)), dtype=dtype)
    return sum_rows(
        torch.cat([no_rows, *(rows for rows, _ in parts)]),
        torch.cat([no_values, *(values for _, values in parts)]),
    )
