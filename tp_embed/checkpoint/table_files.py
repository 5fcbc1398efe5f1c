"""Saves tables with the states of their optimizers, by all ranks together, in a directory of
``torch.distributed.checkpoint``.

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
from tp_embed.optim.masters import prepare
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition

from .contents import (
    DECAY,
    ROW_OPTIMIZER,
    parse_dtype,
)
from .files.arrays import CHUNK_BYTES, Array, Index
from .formats.dcp import metadata
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

    :param held: the rows of the table that each rank of ``gang`` holds.
    :param wanted: the rows that each rank writes; if these are others, rows are sent.
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
