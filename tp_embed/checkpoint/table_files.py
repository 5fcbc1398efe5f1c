"""Saves and loads tables with the states of their optimizers, by all ranks together, in a directory
of ``torch.distributed.checkpoint``.

Each rank writes its own files, block by block: what it alone holds, and of copies a part. Tables in
the files are whole, and a row-wise state of a table that is sharded along its embedding dimension
is there once. So any number of ranks loads them, with any strategy and placement, and so do torch
and ``tp-embed convert``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.gang.agreement import of_all_ranks, raise_together
from tp_embed.gang.redistribute import move_rows
from tp_embed.nn.table import Table
from tp_embed.optim import RowOptimizer
from tp_embed.optim.masters import prepare, write_rows
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition

from .contents import (
    DECAY,
    FP32_STATES,
    ROW_OPTIMIZER,
    WEIGHT,
    Checkpoint,
    ReadOptions,
    parse_dtype,
)
from .errors import CheckpointError
from .files.arrays import CHUNK_BYTES, Array, Index
from .files.derived import values_of
from .formats.dcp import metadata, read
from .formats.dcp.files import Files, Layout
from .formats.dcp.metadata import Chunk, Item, Keys, Place, TensorItem


@dataclass(frozen=True)
class SavedTable:
    """A table to save or load.

    :param names: the keys of its weight in a state dict, one for each module that shares it.
    :param copy: which of the copies of this rank's shard the rank holds, and how many there are.
    """

    names: Sequence[str]
    layer: Table
    optimizer: RowOptimizer
    copy: tuple[int, int] = (0, 1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.num_embeddings, self.layer.embed_dim

    @property
    def state(self) -> dict[str, Any]:
        """The state of the optimizer; empty before its first step."""
        state: dict[str, Any] = self.optimizer.state.get(self.layer.weight, {})
        return state


@dataclass(frozen=True)
class _Part:
    """What this rank writes of a tensor: a box of ``size`` at ``start`` of the whole of ``shape``.

    :param rows: the rows of the table that the ranks of ``gang`` write, if they hold others: then
        rows are sent.
    """

    path: Keys
    shape: Index
    start: Index
    size: Index
    tensor: Tensor
    held: Sequence[range]
    wanted: Sequence[range]
    gang: Gang

    def blocks(self) -> Iterator[tuple[Index, Tensor]]:
        """Yields boxes of at most 16 MiB, each with its first index. If rows are sent, all ranks of
        the gang must take all."""
        rank, is_sent = self.gang.rank, self.held != self.wanted
        row_bytes = max(1, prod(self.tensor.shape[1:]) * self.tensor.element_size())
        count = max(1, CHUNK_BYTES // row_bytes // (self.gang.size if is_sent else 1))
        zeros = (0,) * (len(self.start) - 1)
        if is_sent:
            for first in range(0, max(map(len, self.wanted)), count):
                wanted = [rows[first : first + count] for rows in self.wanted]
                yield (first, *zeros), move_rows(self.tensor, self.held, wanted, self.gang)
            return
        offset = self.start[0] - self.held[rank].start
        for first in range(0, self.size[0], count):
            stop = min(first + count, self.size[0])
            yield (first, *zeros), self.tensor[offset + first : offset + stop]


def save_tables(directory: Path, tables: Sequence[SavedTable], world: Gang) -> None:
    """Writes ``tables``, with the states of their optimizers, to ``directory``, which all ranks
    share. A directory that exists is replaced; until all is written, it is no checkpoint.

    All ranks of ``world`` must call it. They send about 100 bytes per GB; a cyclic table sends each
    row once, to the rank that writes its block.

    :raises OSError: a file cannot be written; a :class:`GangError` on other ranks.
    """
    what = "Saving tables"
    raise_together(world, lambda: _clear(directory) if world.rank == 0 else None, what)
    for table in tables:
        if table.state:  # A rank whose rows had no gradient yet may lack them.
            prepare(local(table.layer.weight), table.state)
    parts = [part for table in tables for part in _parts(table)]
    items = raise_together(world, lambda: _lay_out(directory, parts, world.rank), what)
    failure = _write(directory, parts, items)

    def check() -> None:
        if failure is not None:
            raise failure

    raise_together(world, check, what)
    own = [_described(part, item) for part, item in zip(parts, items, strict=True)]
    described = of_all_ranks(world, own)
    raise_together(
        world,
        lambda: _finish(directory, tables, described) if world.rank == 0 else None,
        what,
    )


def _clear(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / metadata.NAME).unlink(missing_ok=True)  # First: without it, there is nothing.
    for file in directory.glob("*.distcp"):
        file.unlink()


def _parts(table: SavedTable) -> Iterator[_Part]:
    layer, rank = table.layer, table.layer.gang.rank
    whole = range(layer.num_embeddings)
    held = wanted = [whole] * layer.gang.size
    if layer.shard_dim == 0:
        ranks, blocks = range(layer.gang.size), Partition(len(whole), layer.gang.size)
        held, wanted = (list(map(cut.shard, ranks)) for cut in (layer.partition, blocks))
    rows = wanted[rank]
    if held == wanted:
        part = Partition(len(rows), table.copy[1]).shard(table.copy[0])
        rows = rows[part.start : part.stop]
    elif table.copy[0]:
        rows = rows[:0]
    state = ("optimizer", "state", table.names[0])
    tensors: dict[Keys, Any] = {(*state, key): value for key, value in table.state.items()}
    tensors[("model", table.names[0])] = local(layer.weight)
    for path, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        tail, own, place = tuple(tensor.shape[1:]), rows, (0,) * (tensor.dim() - 1)
        if path[-1] not in table.optimizer.row_states or path[0] == "model":
            tail, place = (layer.embed_dim,), (layer.columns.start,)
        elif layer.shard_dim == 1 and rank:
            own = rows[:0]  # Each rank has the same.
        yield _Part(
            path,
            (len(whole), *tail),
            (own.start, *place),
            (len(own), *tensor.shape[1:]),
            tensor.detach(),
            held,
            wanted,
            layer.gang,
        )


def _lay_out(directory: Path, parts: Sequence[_Part], rank: int) -> list[TensorItem]:
    with Layout(directory, rank) as layout:
        return [
            layout.space(part.size, part.tensor.dtype)
            if prod(part.size)
            else TensorItem(part.tensor.dtype, part.size, ())
            for part in parts
        ]


def _write(
    directory: Path, parts: Sequence[_Part], items: Sequence[TensorItem]
) -> Exception | None:
    """Writes all values. Returns a failure: other ranks may be waiting for rows of this one."""
    files, failure = Files(directory), None
    for part, item in zip(parts, items, strict=True):
        array: Array | None = None
        for start, values in part.blocks():
            if failure is not None or not prod(part.size):
                continue
            try:
                array = files.tensor(str(part.path), item) if array is None else array
                array.write(start, values.cpu())
            except Exception as e:
                failure = e
    return failure


def _described(part: _Part, item: TensorItem) -> dict[str, Any]:
    """Describes what this rank has written, as JSON."""
    place = [
        [[i + k for i, k in zip(part.start, chunk.start, strict=True)], chunk.shape, chunk.place]
        for chunk in item.chunks
    ]
    return {"path": part.path, "shape": part.shape, "dtype": str(item.dtype), "chunks": place}


def _finish(
    directory: Path, tables: Sequence[SavedTable], described: Sequence[Sequence[Mapping[str, Any]]]
) -> None:
    """Writes values other than tensors, and the index of all files."""
    chunks: dict[Keys, list[Chunk]] = {}
    kinds: dict[Keys, tuple[torch.dtype, Index]] = {}
    for entry in (entry for entries in described for entry in entries):
        path = tuple(entry["path"])
        kinds[path] = parse_dtype(entry["dtype"]), tuple(entry["shape"])
        chunks.setdefault(path, []).extend(
            Chunk(tuple(start), tuple(shape), Place(*place))
            for start, shape, place in entry["chunks"]
        )
    items: dict[Keys, Item] = {
        path: TensorItem(dtype, shape, tuple(chunks[path]))
        for path, (dtype, shape) in kinds.items()
    }
    with Layout(directory, len(described)) as layout:
        for index, table in enumerate(tables):
            name, *aliases = table.names
            items |= {("model", alias): items["model", name] for alias in aliases}
            if table.state:
                items["optimizer", "state", name, "step"] = layout.value(table.state["step"])
            if DECAY in table.state:
                items["optimizer", "state", name, DECAY] = layout.value(table.state[DECAY])
            group = table.optimizer.param_groups[0]
            rate = {"lr": float(group["lr"]), ROW_OPTIMIZER: type(table.optimizer).__name__}
            names = {"params": [name], "param_names": [name]}
            for key, value in {**group, **rate, **names}.items():
                items["optimizer", "param_groups", index, key] = layout.value(value)
    flat = {".".join(map(str, path)): path for path in items}
    metadata.write(
        directory / metadata.NAME, {key: items[path] for key, path in flat.items()}, flat
    )


def load_tables(
    directory: Path, tables: Sequence[SavedTable], world: Gang, *, with_states: bool = True
) -> None:
    """Loads ``tables``, and with ``with_states`` the states and hyperparameters of their
    optimizers, from the output of :func:`save_tables` on any number of ranks. Each rank reads its
    own rows, block by block; of a cyclic table it reads all rows and keeps its own.

    All ranks of ``world`` must call it. They send nothing, but learn if another has failed.

    :raises CheckpointError: a file is missing or damaged, or tables, sizes or optimizers differ; a
        :class:`GangError` on other ranks. If they differ, nothing has changed.
    """

    def load() -> None:
        if not directory.is_dir():
            raise CheckpointError(
                f"There must be a directory `{directory}`, with the tables that have an optimizer "
                "of their own, but there is none. Use the same `tp_embed.tables` as the engine "
                "that was saved."
            )
        saved = read(directory, ReadOptions())
        _check(directory, saved, tables, with_states)
        for table in tables:
            _load(table, saved, with_states)

    raise_together(world, load, "Loading tables")


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


@torch.no_grad()
def _load(table: SavedTable, saved: Checkpoint, with_states: bool) -> None:
    name = saved.ties.get(table.names[0], table.names[0])
    arrays = {key.state: array for key, array in saved.tensors.items() if key.name == name}
    weight, optimizer = local(table.layer.weight), table.optimizer
    steps = saved.optimizer.steps if saved.optimizer and with_states else {}
    is_same = arrays[WEIGHT].dtype == weight.dtype
    best = values_of(arrays[WEIGHT], *map(arrays.get, FP32_STATES))
    if is_same or name not in steps:
        source = arrays[WEIGHT] if is_same else best
        for part, values in _blocks(table, source, weight):
            weight[part] = values.to(weight.dtype)
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
            for part, values in _blocks(table, array, state[key]):
                state[key][part] = values
    if not is_same:
        _load_cast(table, weight, state, best)


def _load_cast(table: SavedTable, weight: Tensor, state: dict[str, Any], array: Array) -> None:
    """Loads values that were saved in another dtype than the weight's."""
    prepare(weight, state)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for part, values in _blocks(table, array, weight):
        rows = torch.arange(part.start, part.stop, device=weight.device)
        write_rows(weight, state, rows, values.to(weight.device, dtype))


def _tensor(table: SavedTable, key: str, array: Array, old: Any) -> Tensor:
    """Returns a tensor for this rank's part of a state, the ``old`` one if it fits."""
    weight = local(table.layer.weight)
    tail = table.optimizer.row_states.get(key, tuple(weight.shape[1:]))
    if isinstance(old, Tensor) and (*old.shape[1:], old.dtype) == (*tail, array.dtype):
        return old
    return weight.new_empty((len(weight), *tail), dtype=array.dtype)


def _blocks(table: SavedTable, array: Array, to: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields this rank's rows of ``array`` in blocks, with their places in ``to``."""
    rows, columns = table.layer.rows, table.layer.columns
    is_cut = to.dim() == 2 and to.shape[1] != array.shape[1]
    place = (columns.start if is_cut else 0,) * (to.dim() - 1)
    row_bytes = max(1, prod(to.shape[1:]) * array.dtype.itemsize)
    count = max(1, CHUNK_BYTES // row_bytes // rows.step)
    for first in range(0, len(rows), count):
        part = rows[first : first + count]
        size = part[-1] + 1 - part[0]
        values = torch.empty((size, *to.shape[1:]), dtype=array.dtype)
        array.read((part[0], *place), values)
        yield slice(first, first + len(part)), values[:: rows.step]
