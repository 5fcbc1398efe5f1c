"""Arrays in files, read and written box by box, whatever their size.

A reader describes where each tensor is, as a tree of arrays: a :class:`Span` is a run of bytes in a
file, a :class:`View` gives a flat array a shape, a :class:`Joined` assembles arrays as tiles of a
larger one. A writer does the same: it lays out the files first, then fills their arrays.

A *box* is given by its first index, `start`, and the tensor that it is read into or written from,
which has its shape.
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ..errors import CheckpointError
from .hashes import RunningHash

Index = tuple[int, ...]

# The most bytes read or written at a time.
CHUNK_BYTES = 16 * 2**20

# The most bytes per write call: ext4 is several times slower with 16 MiB at once.
_WRITE_BYTES = 2**20

# Reading this many bytes takes about as long as seeking.
_GAP_BYTES = 4096


class Array(ABC):
    """A tensor in files, of ``shape`` and ``dtype``."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape: Index = tuple(shape)
        self.dtype = dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @abstractmethod
    def read(self, start: Index, out: Tensor) -> None:
        """Fills ``out``, of this dtype and any strides, with the box of its shape at ``start``."""

    @abstractmethod
    def write(self, start: Index, values: Tensor) -> None:
        """Writes ``values``, of this dtype and any strides, into the box of its shape at
        ``start``."""

    def load(self) -> Tensor:
        """Loads the whole array into memory."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read((0,) * len(self.shape), out)
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape}, {self.dtype})"


@final
class Span(Array):
    """``size`` contiguous elements in a file, starting at byte ``offset``.

    Opens the file for each access, so that any number of spans can exist.

    :param hashing: the hash of the file, updated on writing.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        size: int,
        dtype: torch.dtype,
        hashing: RunningHash | None = None,
    ) -> None:
        super().__init__((size,), dtype)
        self.path = path
        self.offset = offset
        self._hashing = hashing

    def read(self, start: Index, out: Tensor) -> None:
        if not out.is_contiguous():
            dense = torch.empty(out.shape, dtype=out.dtype)
            self.read(start, dense)
            out.copy_(dense)
            return
        buffer, offset = _bytes_of(out), self.offset + start[0] * self.dtype.itemsize
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while buffer:
                count = os.preadv(file, [buffer], offset)
                if count == 0:
                    raise CheckpointError(
                        f"`{self.path}` must have bytes up to {offset + len(buffer)}, but ends at "
                        f"{offset}. It is truncated: copy it again."
                    )
                buffer, offset = buffer[count:], offset + count
        finally:
            os.close(file)

    def write(self, start: Index, values: Tensor) -> None:
        values = values.contiguous()
        buffer, offset = _bytes_of(values), self.offset + start[0] * self.dtype.itemsize
        with self._hashing.following(offset, buffer) if self._hashing else nullcontext():
            file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                while buffer:
                    count = os.pwritev(file, [buffer[:_WRITE_BYTES]], offset)
                    buffer, offset = buffer[count:], offset + count
            finally:
                os.close(file)


@final
class View(Array):
    """A view of a flat array, as :func:`torch.as_strided` makes.

    :param strides: in elements. Default: contiguous.
    :raises CheckpointError: the view reaches beyond ``flat``.
    """

    def __init__(
        self,
        flat: Array,
        shape: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> None:
        super().__init__(shape, flat.dtype)
        self._flat = flat
        self._strides = contiguous_strides(shape) if strides is None else tuple(strides)
        self._offset = offset
        end = offset + _extent(self.shape, self._strides)
        is_inside = offset >= 0 and min(self._strides, default=0) >= 0 and end <= flat.numel
        if self.numel and not is_inside:
            raise CheckpointError(
                f"A tensor of shape {self.shape}, strides {self._strides} and offset {offset} must "
                f"lie in its storage, but that has {flat.numel} elements."
            )
        # From the largest stride to the smallest.
        self._order = sorted(range(len(self.shape)), key=lambda dim: -self._strides[dim])

    def read(self, start: Index, out: Tensor) -> None:
        if out.numel():
            self._transfer(start, out, self._read_dense)

    def write(self, start: Index, values: Tensor) -> None:
        if values.numel():
            self._transfer(start, values, self._write_dense)

    def _transfer(
        self, start: Index, box: Tensor, dense: Callable[[int, Tensor, Index], bool]
    ) -> None:
        begin = self._offset + sum(i * s for i, s in zip(start, self._strides, strict=True))
        strides = tuple(self._strides[dim] for dim in self._order)
        self._split(begin, box.permute(self._order), strides, dense)

    def _split(
        self,
        begin: int,
        box: Tensor,
        strides: Index,
        dense: Callable[[int, Tensor, Index], bool],
    ) -> None:
        """Passes ``box`` to ``dense`` in parts that fit one access, row by row if necessary."""
        if dense(begin, box, strides):
            return
        dim = next(dim for dim, size in enumerate(box.shape) if size > 1)
        # As many as fit at a time. If not even one does, the recursion splits the next dimension.
        inner = _extent(box.shape[dim + 1 :], strides[dim + 1 :])
        fitting = 1 + max(0, CHUNK_BYTES // self.dtype.itemsize - inner) // max(1, strides[dim])
        if fitting >= box.shape[dim]:  # Refused for another reason than its size.
            fitting = 1
        for first in range(0, box.shape[dim], fitting):
            part = box.narrow(dim, first, min(fitting, box.shape[dim] - first))
            self._split(begin + first * strides[dim], part, strides, dense)

    def _read_dense(self, begin: int, box: Tensor, strides: Index) -> bool:
        extent = _extent(box.shape, strides)
        if box.is_contiguous() and _is_dense(box.shape, strides):
            self._flat.read((begin,), box.reshape(-1))
            return True
        nbytes = extent * self.dtype.itemsize
        # Distant runs, as in a transposed matrix, have too much to skip between them.
        is_sparse = strides[-1:] == (1,) and nbytes > _GAP_BYTES * (box.numel() // box.shape[-1])
        if (is_sparse or nbytes > CHUNK_BYTES) and box.numel() > 1 and len(box.shape) > 1:
            return False
        if nbytes > CHUNK_BYTES and box.numel() > 1:
            return False
        scratch = torch.empty(extent, dtype=self.dtype)
        self._flat.read((begin,), scratch)
        box.copy_(scratch.as_strided(box.shape, strides))
        return True

    def _write_dense(self, begin: int, box: Tensor, strides: Index) -> bool:
        if not _is_dense(box.shape, strides):  # The gaps belong to other elements.
            return False
        self._flat.write((begin,), box.reshape(-1))
        return True


@dataclass(frozen=True)
class Tile:
    """Puts the box of ``shape`` at ``source`` in ``array`` to ``start`` in a larger array."""

    start: Index
    array: Array
    source: Index
    shape: Index

    @staticmethod
    def whole(start: Index, array: Array) -> Tile:
        return Tile(start, array, (0,) * len(array.shape), array.shape)


@final
class Joined(Array):
    """An array assembled from tiles.

    :raises CheckpointError: the tiles overlap, leave a gap, or reach beyond the array.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, tiles: Sequence[Tile]) -> None:
        super().__init__(shape, dtype)
        self._tiles = [tile for tile in tiles if prod(tile.shape)]
        for tile in self._tiles:
            self._check(tile)
        covered = sum(prod(tile.shape) for tile in self._tiles)
        if covered != self.numel or _overlap(self._tiles):
            raise CheckpointError(
                f"The {len(tiles)} parts of a tensor of shape {self.shape} must cover each of its "
                f"{self.numel} elements once, but have {covered} elements"
                f"{' and overlap' if covered >= self.numel else ''}."
            )

    def _check(self, tile: Tile) -> None:
        inside = all(
            begin >= 0 and begin + size <= limit
            for place, limits in ((tile.start, self.shape), (tile.source, tile.array.shape))
            for begin, size, limit in zip(place, tile.shape, limits, strict=True)
        )
        if tile.array.dtype != self.dtype or not inside:
            raise CheckpointError(
                f"A part of a tensor of {self.dtype} and shape {self.shape} must lie within it, "
                f"but is of {tile.array.dtype} and shape {tile.shape} at {tile.start}."
            )

    def read(self, start: Index, out: Tensor) -> None:
        for array, source, part in self._parts(start, out):
            array.read(source, part)

    def write(self, start: Index, values: Tensor) -> None:
        for array, source, part in self._parts(start, values):
            array.write(source, part)

    def _parts(self, start: Index, box: Tensor) -> Iterator[tuple[Array, Index, Tensor]]:
        """Yields for each tile its array, the overlap's start in it, and the part of ``box``."""
        for tile in self._tiles:
            part, source = box, []
            for dim, (begin, size) in enumerate(zip(start, box.shape, strict=True)):
                first = max(begin, tile.start[dim])
                last = min(begin + size, tile.start[dim] + tile.shape[dim])
                if first >= last:
                    break
                part = part.narrow(dim, first - begin, last - first)
                source.append(tile.source[dim] + first - tile.start[dim])
            else:
                yield tile.array, tuple(source), part


def part(array: Array, start: Index, shape: Index) -> Array:
    """Returns the box of ``shape`` at ``start`` in ``array``."""
    origin = (0,) * len(shape)
    return Joined(shape, array.dtype, [Tile(origin, array, start, shape)])


def boxes(shape: Index, itemsize: int) -> Iterator[tuple[Index, Index]]:
    """Cuts ``shape`` into boxes of at most :data:`CHUNK_BYTES`, in row-major order. Yields their
    first indices and shapes. Rows stay whole if they fit."""
    if not prod(shape):
        return
    inner = prod(shape[1:]) * itemsize
    if not shape or prod(shape) * itemsize <= CHUNK_BYTES:
        yield (0,) * len(shape), shape
    elif inner <= CHUNK_BYTES:
        rows = CHUNK_BYTES // inner
        for first in range(0, shape[0], rows):
            yield (first, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - first), *shape[1:])
    else:
        for row in range(shape[0]):
            for start, part in boxes(shape[1:], itemsize):
                yield (row, *start), (1, *part)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Returns whether two tensors of one dtype and shape hold the same bytes, NaNs included."""
    return torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (first, second)))


def contiguous_strides(shape: Sequence[int]) -> Index:
    """Returns the strides of a contiguous tensor of ``shape``, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Returns the number of storage elements that a tensor spans."""
    if not prod(shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Returns whether a tensor is contiguous in row-major order."""
    return all(
        size == 1 or stride == expected
        for size, stride, expected in zip(shape, strides, contiguous_strides(shape), strict=True)
    )


def _overlap(tiles: Sequence[Tile]) -> bool:
    """Returns whether two tiles overlap."""
    if not tiles or not tiles[0].start:
        return len(tiles) > 1
    # Sort along the dimension with the most cuts, so that few pairs are compared.
    dim = max(range(len(tiles[0].start)), key=lambda dim: len({t.start[dim] for t in tiles}))
    ordered = sorted(tiles, key=lambda tile: tile.start[dim])
    for index, tile in enumerate(ordered):
        for other in islice(ordered, index + 1, None):
            if other.start[dim] >= tile.start[dim] + tile.shape[dim]:
                break
            if all(
                max(a, b) < min(a + m, b + n)
                for a, m, b, n in zip(tile.start, tile.shape, other.start, other.shape, strict=True)
            ):
                return True
    return False


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
