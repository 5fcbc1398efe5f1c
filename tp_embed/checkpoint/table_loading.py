"""Loads tables with the states of their optimizers from the output of
:func:`~tp_embed.checkpoint.table_files.save_tables`, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.gang.agreement import raise_together
from tp_embed.gang.redistribute import move_rows
from tp_embed.optim.masters import prepare, write_rows
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition, as_slice, within

from .contents import DECAY, FP32_STATES, ROW_OPTIMIZER, WEIGHT, Checkpoint, ReadOptions
from .errors import CheckpointError
from .files.arrays import CHUNK_BYTES, Array
from .files.derived import values_of
from .formats.dcp import read
from .table_files import SavedTable

_WHAT = "Loading tables"


class TableLoader:
    """Opens the output of :func:`~tp_embed.checkpoint.table_files.save_tables`, and checks that it
    fits ``tables``. All ranks of ``world`` must make it, and load, together.

    :param with_states: whether to load the states and hyperparameters of the optimizers too.
    :raises CheckpointError: a file is missing or damaged, or tables, sizes or optimizers differ; a
        :class:`GangError` on other ranks.
    """

    def __init__(
        self,
        directory: Path,
        tables: Sequence[SavedTable],
        world: Gang,
        *,
        with_states: bool = True,
    ) -> None:
        self._tables, self._world, self._with_states = tables, world, with_states
        # The first failure to read: other ranks may be waiting for rows of this one.
        self._failure: Exception | None = None

        def find() -> Checkpoint:
            if not directory.is_dir():
                raise CheckpointError(
                    f"There must be a directory `{directory}`, with the tables that have an "
                    "optimizer of their own, but there is none. Use the same `tp_embed.tables` as "
                    "the engine that was saved."
                )
            saved = read(directory, ReadOptions())
            _check(directory, saved, tables, with_states)
            return saved

        self._saved = raise_together(world, find, _WHAT)

    def load(self) -> None:
        """Loads the tables. Each rank reads its own rows, block by block; of a cyclic table it
        reads some neighbours and sends each to its rank.

        :raises CheckpointError: a file is damaged; a :class:`GangError` on other ranks.
        """
        for table in self._tables:
            self._load(table)

        def check() -> None:
            if self._failure is not None:
                raise self._failure

        raise_together(self._world, check, _WHAT)

    @torch.no_grad()
    def _load(self, table: SavedTable) -> None:
        saved, optimizer, with_states = self._saved, table.optimizer, self._with_states
        name = saved.ties.get(table.names[0], table.names[0])
        arrays = {key.state: array for key, array in saved.tensors.items() if key.name == name}
        weight = local(table.layer.weight)
        steps = saved.optimizer.steps if saved.optimizer and with_states else {}
        is_same = arrays[WEIGHT].dtype == weight.dtype
        best = values_of(arrays[WEIGHT], *map(arrays.get, FP32_STATES))
        if is_same or name not in steps:
            self._fill(table, arrays[WEIGHT] if is_same else best, weight)
        if not with_states:
            optimizer.refresh()
            return
        group = dict(_groups(saved)[name])
        for key in ("params", "param_names", ROW_OPTIMIZER):
            group.pop(key, None)
        optimizer.param_groups[0].update(group)
        old = optimizer.state.pop(table.layer.weight, {})
        if name not in steps:
            return
        state = optimizer.state[table.layer.weight]
        state["step"] = int(steps[name])
        for key, array in arrays.items():
            if key == DECAY:
                state[key] = float(array.load())
            elif key != WEIGHT and (is_same or key not in FP32_STATES):
                state[key] = _tensor(table, key, array, old.get(key))
                self._fill(table, array, state[key])
        if not is_same:
            self._cast(table, weight, state, best)

    def _fill(self, table: SavedTable, array: Array, to: Tensor) -> None:
        for part, values in self._blocks(table, array, to):
            to[part] = values.to(to.dtype)

    def _cast(self, table: SavedTable, weight: Tensor, state: dict[str, Any], array: Array) -> None:
        """Loads values that were saved in another dtype than the weight's."""
        prepare(weight, state)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for part, values in self._blocks(table, array, weight):
            rows = torch.arange(part.start, part.stop, device=weight.device)
            write_rows(weight, state, rows, values.to(weight.device, dtype))

    def _blocks(
        self, table: SavedTable, array: Array, to: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields this rank's rows of ``array`` in blocks, with their places in ``to``. All ranks of
        a cyclic table must take all."""
        rows, columns, gang = table.layer.rows, table.layer.columns, table.layer.gang
        is_cut = to.dim() == 2 and to.shape[1] != array.shape[1]
        place = (columns.start if is_cut else 0,) * (to.dim() - 1)
        row_bytes = max(1, prod(to.shape[1:]) * array.dtype.itemsize)

        def read(part: range) -> Tensor:
            values = torch.zeros((len(part), *to.shape[1:]), dtype=array.dtype)
            try:
                array.read((part.start, *place), values)
            except Exception as e:
                self._failure = self._failure or e
            return values

        if rows.step == 1:
            count = max(1, CHUNK_BYTES // row_bytes)
            for first in range(0, len(rows), count):
                part = rows[first : first + count]
                yield slice(first, first + len(part)), read(part)
            return
        # Each rank reads a part of neighbouring rows.
        count = max(1, CHUNK_BYTES // 4 // row_bytes) * gang.size
        shards = [table.layer.partition.shard(rank) for rank in range(gang.size)]
        for first in range(0, array.shape[0], count):
            block = range(first, min(first + count, array.shape[0]))
            parts = Partition(len(block), gang.size)
            held = [block[as_slice(parts.shard(rank))] for rank in range(gang.size)]
            places = [within(shard, block.start, block.stop) for shard in shards]
            wanted = [shard[own] for shard, own in zip(shards, places, strict=True)]
            values = move_rows(read(held[gang.rank]), held, wanted, gang)
            yield places[gang.rank], values


def _check(
    directory: Path, saved: Checkpoint, tables: Sequence[SavedTable], with_states: bool
) -> None:
    own = {table.names[0] for table in tables}
    found = {saved.ties.get(name, name) for name in saved.names}
    if {saved.ties.get(name, name) for name in own} != found:
        raise CheckpointError(
            f"`{directory}` must have the tables with an optimizer of their own, {sorted(own)}, "
            f"but has {sorted(found)}. Use the same `tp_embed.tables`."
        )
    groups = _groups(saved)
    for table in tables:
        name = saved.ties.get(table.names[0], table.names[0])
        if saved.shape(name) != table.shape:
            raise CheckpointError(
                f"`{name}` must have the shape {table.shape}, but in `{directory}` it has "
                f"{saved.shape(name)}. Build the model that was saved."
            )
        kind, own_kind = groups[name].get(ROW_OPTIMIZER), type(table.optimizer).__name__
        if with_states and kind != own_kind:
            raise CheckpointError(
                f"The optimizer of `{name}` must be a `{own_kind}`, but in `{directory}` it is a "
                f"`{kind}`. Use the same `tp_embed.tables`, or load without optimizer states: "
                "`load_optimizer_states=False`."
            )


def _groups(saved: Checkpoint) -> dict[str, Mapping[str, Any]]:
    groups = saved.optimizer.groups if saved.optimizer else ()
    return {name: group for group in groups for name in group["params"]}


def _tensor(table: SavedTable, key: str, array: Array, old: Any) -> Tensor:
    """Returns a tensor for this rank's part of a state, the ``old`` one if it fits."""
    weight = local(table.layer.weight)
    tail = table.optimizer.row_states.get(key, tuple(weight.shape[1:]))
    if isinstance(old, Tensor) and (*old.shape[1:], old.dtype) == (*tail, array.dtype):
        return old
    return weight.new_empty((len(weight), *tail), dtype=array.dtype)
