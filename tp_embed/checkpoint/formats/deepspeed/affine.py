"""Reads and writes entries of DeepSpeed's affine maps, which describe how a Parameter is cut.

An entry has the shapes of the whole and of each rank's shard, and pieces: boxes of both, given by
an offset and strides as for :func:`torch.as_strided`. See ``deepspeed/checkpoint/affine.py`` and
``affine_ir_spec.md`` next to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ...cuts import Cut
from ...errors import CheckpointError
from ...files.arrays import Array, Index, Joined, Tile, contiguous_strides, part
from ...files.derived import Copies
from .files import optional

VERSION = 1  # the newest known version of the maps


@dataclass(frozen=True)
class Piece:
    """Puts the box of ``shape`` at ``source`` in the whole to ``dest`` in the shard of ``rank``."""

    rank: int
    shape: Index
    source: Index
    dest: Index


@dataclass(frozen=True)
class AffineMap:
    """An entry whose pieces are boxes of the whole."""

    shape: Index
    shards: tuple[Index, ...]
    pieces: tuple[Piece, ...]

    @staticmethod
    def parse(name: str, entry: Any, tp_size: int, path: Path) -> AffineMap:
        """Parses an entry.

        :raises CheckpointError: the entry is invalid, for another number of ranks, or has pieces
            that are no boxes or are scaled, which DeepSpeed 0.19 does not write.
        """
        try:
            found = AffineMap.from_dict(entry)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise CheckpointError(
                f"The map of `{name}` in `{path}` must consist of pieces, each a box without a "
                f"scale, but does not: {type(e).__name__}: {e}. Say how it is cut with `--rules`, "
                "or copy the file again."
            ) from e
        if len(found.shards) != tp_size:
            raise CheckpointError(
                f"The map of `{name}` in `{path}` must be for {tp_size} tensor-parallel ranks, as "
                f"the files are, but is for {len(found.shards)}."
            )
        return found

    @staticmethod
    def from_dict(entry: Any) -> AffineMap:
        """Undoes :meth:`to_dict`. An invalid entry raises any error that :meth:`parse` catches."""
        shape = _index(entry["logical_shape"])
        ranks = {int(rank): value for rank, value in entry["ranks"].items()}
        shards = tuple(_index(ranks[rank]["shard_shape"]) for rank in range(len(ranks)))
        pieces = tuple(
            _piece(rank, piece, shape, shards[rank])
            for rank in range(len(ranks))
            for piece in ranks[rank]["pieces"]
        )
        return AffineMap(shape, shards, pieces)

    @staticmethod
    def of(shape: Sequence[int], cut: Cut | None, tp_size: int) -> AffineMap:
        """Builds the entry for a tensor of ``shape``."""
        whole = tuple(shape)
        if cut is None:
            origin = (0,) * len(whole)
            pieces = [Piece(rank, whole, origin, origin) for rank in range(tp_size)]
            return AffineMap(whole, (whole,) * tp_size, tuple(pieces))
        before, after = (0,) * cut.dim, (0,) * (len(whole) - cut.dim - 1)
        pieces = []
        for rank, parts in enumerate(cut.ranges):
            place = 0
            for own in parts:
                box = (*whole[: cut.dim], len(own), *whole[cut.dim + 1 :])
                source, dest = ((*before, first, *after) for first in (own.start, place))
                pieces.append(Piece(rank, box, source, dest))
                place += len(own)
        shards = tuple(cut.shard_shape(whole, rank) for rank in range(tp_size))
        return AffineMap(whole, shards, tuple(pieces))

    def to_dict(self) -> dict[str, Any]:
        """Builds the entry as ``ParamAffineMap.to_dict()`` of DeepSpeed does."""
        ranks: dict[int, dict[str, Any]] = {
            rank: {"shard_shape": list(shard), "pieces": []}
            for rank, shard in enumerate(self.shards)
        }
        places: dict[tuple[Index, Index], list[int]] = {}
        for piece in self.pieces:
            places.setdefault((piece.source, piece.shape), []).append(piece.rank)
        for piece in self.pieces:
            entry = {
                "shape": list(piece.shape),
                "source": _view(piece.source, self.shape),
                "dest": _view(piece.dest, self.shards[piece.rank]),
                "locations": places[piece.source, piece.shape],
            }
            ranks[piece.rank]["pieces"].append(entry)
        return {"logical_shape": list(self.shape), "ranks": ranks}

    @property
    def is_replicated(self) -> bool:
        """Whether every rank has all of it."""
        whole = [piece for piece in self.pieces if piece.shape == self.shape]
        return len(whole) == len(self.pieces) == len(self.shards)

    def cut(self) -> Cut | None:
        """Converts the entry to a cut along one dimension. Returns ``None`` if elements are on
        several ranks, or several dimensions are cut."""
        held = [piece for piece in self.pieces if prod(piece.shape)]
        cut_dims = {
            dim
            for shape in (*self.shards, *(piece.shape for piece in self.pieces))
            for dim, (size, whole) in enumerate(zip(shape, self.shape, strict=True))
            if size != whole
        }
        if len(cut_dims) != 1 or sum(prod(piece.shape) for piece in held) != prod(self.shape):
            return None
        dim = cut_dims.pop()
        by_rank = [
            tuple(
                range(piece.source[dim], piece.source[dim] + piece.shape[dim])
                for piece in sorted(self.pieces, key=lambda piece: piece.dest[dim])
                if piece.rank == rank
            )
            for rank in range(len(self.shards))
        ]
        count = max(map(len, by_rank))
        return Cut(dim, tuple((*own, *(range(0),) * (count - len(own))) for own in by_rank))

    def join(self, what: str, shards: Sequence[Array]) -> Array:
        """Joins the shards of all ranks.

        :raises CheckpointError: a shard has another shape, or a box is missing; on reading, copies
            of a box differ.
        """
        for rank, (shard, expected) in enumerate(zip(shards, self.shards, strict=True)):
            if shard.shape != expected:
                raise CheckpointError(
                    f"Rank {rank}'s shard of `{what}` must have the shape {expected}, as the map "
                    f"of the checkpoint says, but has {shard.shape}."
                )
        found: dict[tuple[Index, Index], list[Tile]] = {}
        for piece in self.pieces:
            tile = Tile(piece.source, shards[piece.rank], piece.dest, piece.shape)
            found.setdefault((piece.source, piece.shape), []).append(tile)
        return Joined(
            self.shape,
            shards[0].dtype,
            [tiles[0] if len(tiles) == 1 else _copies(what, tiles) for tiles in found.values()],
        )

    def rebuild(self, shards: Sequence[Tensor]) -> Tensor:
        """Joins the shards of all ranks into a new tensor."""
        whole = shards[0].new_empty(self.shape)
        for piece in self.pieces:
            shard = shards[piece.rank]
            _box(whole, piece.source, piece.shape).copy_(_box(shard, piece.dest, piece.shape))
        return whole


def find_maps(info: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Returns the entries of a checkpoint by name pattern.

    :raises CheckpointError: they have a newer version.
    """
    maps = optional(info.get("affine_map"), dict, "`affine_map`", path)
    version = maps.get("version", VERSION)
    params = optional(maps.get("params"), dict, "The maps", path)
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"The `affine_map` in `{path}` must have version {VERSION}, but is "
            f"{str(maps)[:100]}. It was written by a newer DeepSpeed: say how Parameters are cut "
            "with `--rules`."
        )
    return params


def _box(tensor: Tensor, start: Index, shape: Index) -> Tensor:
    return tensor[tuple(slice(i, i + n) for i, n in zip(start, shape, strict=True))]


def _copies(what: str, tiles: Sequence[Tile]) -> Tile:
    """Returns a tile for a box that several ranks have."""
    parts = [part(tile.array, tile.source, tile.shape) for tile in tiles]
    return Tile.whole(tiles[0].start, Copies(what, parts))


def _piece(rank: int, entry: Any, whole: Index, shard: Index) -> Piece:
    if entry.get("scale", 1.0) != 1.0:
        raise ValueError(f"a piece has the scale {entry['scale']}")
    shape = _index(entry["shape"])
    source, dest = (
        _place(entry[key], shape, of) for key, of in (("source", whole), ("dest", shard))
    )
    return Piece(rank, shape, source, dest)


def _view(index: Index, of: Index) -> list[Any]:
    """Formats a position as :func:`_place` reads it."""
    strides = contiguous_strides(of)
    return [sum(i * stride for i, stride in zip(index, strides, strict=True)), list(strides)]


def _place(view: Any, box: Index, of: Index) -> Index:
    """Returns the first index of a box in a tensor of shape ``of``."""
    offset, strides = view
    (offset,) = _index([offset])
    expected = contiguous_strides(of)
    if len(box) != len(of) or any(
        size > 1 and stride != own
        for size, stride, own in zip(box, _index(strides), expected, strict=True)
    ):
        raise ValueError(f"a piece of shape {box} and strides {strides} is no box of {of}")
    index = []
    for stride in expected:
        index.append(offset // stride if prod(of) else 0)
        offset -= index[-1] * stride
    if prod(box) and any(i + n > size for i, n, size in zip(index, box, of, strict=True)):
        raise ValueError(f"a piece of shape {box} at {tuple(index)} is not within {of}")
    return tuple(index)


def _index(values: Any) -> Index:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"sizes must be integers from 0 on, but are {str(values)[:100]}")
    return tuple(values)
