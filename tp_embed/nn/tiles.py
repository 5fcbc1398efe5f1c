"""Tiles: blocks of classes at fixed places in the vocabulary. One rank of a gang computes each, so
what it computes doesn't depend on the size of the gang; nor do sums over tiles that are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tp_embed.gang import Gang, ReduceOperation
from tp_embed.partition import Partition, overlap

# The number of classes of a tile. Sums over tiles take less time for large tiles. Small ones are
# shared out more evenly.
_TILE = 512
_DEVICE_TILE = 4096

# Products may depend on the alignment of their operands; memory of torch has this one.
_ALIGNMENT = 64

# How many numbers are added at once, within the caches of a CPU.
_ADDED_ITEMS = 1 << 16


@dataclass(frozen=True)
class Tiling:
    """Which rank of ``gang`` computes which tiles of a table.

    Of a table that is sharded along the vocabulary, a rank computes the tiles whose first row it
    has, and gets at most ``size - 1`` rows from ranks after it. Of a table that is sharded along
    the embedding dimension, ranks get whole rows of about as many tiles each.

    :param partition: the partition of ``shard_dim`` over the gang.
    :param width: the size of the embedding dimension, E.
    :param size: the number of classes of a tile; the last tile may have fewer.
    """

    gang: Gang
    partition: Partition
    shard_dim: int
    num_classes: int
    width: int
    size: int

    @property
    def num_tiles(self) -> int:
        return -(-self.num_classes // self.size)

    @property
    def sizes(self) -> list[int]:
        """The number of tiles of each rank."""
        return [len(self._tiles(rank)) for rank in range(self.gang.size)]

    @property
    def classes(self) -> list[range]:
        """The classes of each tile of this rank."""
        tiles = self._tiles(self.gang.rank)
        return [self._rows(range(tile, tile + 1)) for tile in tiles]

    @property
    def rows(self) -> range:
        """The classes of all tiles of this rank."""
        return self.rows_of(self.gang.rank)

    def rows_of(self, rank: int) -> range:
        return self._rows(self._tiles(rank))

    def _rows(self, tiles: range) -> range:
        first, last = (
            min(tile * self.size, self.num_classes) for tile in (tiles.start, tiles.stop)
        )
        return range(first, last)

    def _tiles(self, rank: int) -> range:
        if self.shard_dim:
            return Partition(self.num_tiles, self.gang.size).shard(rank)
        own = self.partition.shard(rank)
        return range(-(-own.start // self.size), -(-own.stop // self.size))

    def fetch(self, weight: Tensor) -> list[Tensor]:
        """Returns the weight of each tile of this rank, *Shape:* :math:`(T,E)`, in the memory of
        ``weight`` where it is there and aligned.

        Does one all-to-all: of less than T E items per rank for a table that is sharded along the
        vocabulary, none if no tile crosses shards; else of V E / P items.
        """
        table, first = weight, self.rows.start
        if not self.shard_dim:
            first = self.partition.shard(self.gang.rank).start
        elif self.gang.size > 1:
            table = self._recut(weight)
        tiles = [table[rows.start - first : rows.stop - first] for rows in self.classes]
        if self._crosses():
            sent, received = self._exchanged()
            missing = weight.new_empty(sum(received), self.width)
            self.gang.all_to_all(missing, weight[: sum(sent)], received, sent)
            if len(missing):
                tiles[-1] = torch.cat([tiles[-1], missing])
        return [aligned(tile) for tile in tiles]

    def new_gradient(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Returns memory for :meth:`give_back`, and a part of it for each tile."""
        first, rows = self.rows.start, len(self.rows)
        if not self.shard_dim:
            first, rows = self.partition.shard(self.gang.rank).start, len(weight)
        memory = weight.new_empty(rows, self.width, dtype=dtype)
        classes = self.classes
        tiles = [memory[rows.start - first : rows.stop - first] for rows in classes]
        if tiles and len(tiles[-1]) < len(classes[-1]):
            tiles[-1] = memory.new_empty(len(classes[-1]), self.width)
        return memory, tiles

    def give_back(self, memory: Tensor, tiles: list[Tensor]) -> Tensor:
        """Returns the gradient of the weight, from the tiles' gradients. Sends what :meth:`fetch`
        receives."""
        if self.shard_dim and self.gang.size > 1:
            return self._recut_back(memory)
        if self._crosses():
            sent, received = self._exchanged()
            others = memory.new_empty(0, self.width)
            if sum(received):
                own = len(tiles[-1]) - sum(received)
                memory[len(memory) - own :] = tiles[-1][:own]
                others = tiles[-1][own:]
            self.gang.all_to_all(memory[: sum(sent)], others, sent, received)
        return memory

    def _crosses(self) -> bool:
        """Returns whether any tile is in several shards."""
        ranks = range(self.gang.size)
        return not self.shard_dim and any(
            self.rows_of(rank).stop != self.partition.shard(rank).stop for rank in ranks
        )

    def _exchanged(self) -> tuple[list[int], list[int]]:
        """Returns how many rows each rank gets from this one, which are its first rows, and how
        many this one gets from each, which are the last rows of its last tile."""
        own, rank = self.partition.shard(self.gang.rank), self.gang.rank
        sent, received = [], []
        for other in range(self.gang.size):
            of_other, is_other = self.partition.shard(other), other != rank
            sent.append(overlap(own, self.rows_of(other)) * is_other)
            received.append(overlap(of_other, self.rows) * is_other)
        return sent, received

    def _recut(self, weight: Tensor) -> Tensor:
        """Exchanges columns of all rows for all columns of this rank's rows."""
        rows, columns = len(self.rows), self.partition.sizes
        sent = [len(self.rows_of(rank)) * weight.size(1) for rank in range(self.gang.size)]
        received = [rows * size for size in columns]
        flat = weight.new_empty(sum(received))
        self.gang.all_to_all(flat, weight.reshape(-1), received, sent)
        pieces = zip(flat.split(received), columns, strict=True)
        return torch.cat([piece.view(rows, size) for piece, size in pieces], 1)

    def _recut_back(self, table: Tensor) -> Tensor:
        width = len(self.partition.shard(self.gang.rank))
        sent = [len(table) * size for size in self.partition.sizes]
        received = [len(self.rows_of(rank)) * width for rank in range(self.gang.size)]
        flat = torch.cat([piece.reshape(-1) for piece in table.split(self.partition.sizes, 1)])
        output = table.new_empty(self.num_classes * width)
        self.gang.all_to_all(output, flat, received, sent)
        return output.view(self.num_classes, width)


def tile_size(device: torch.device) -> int:
    """Returns the number of classes of a tile."""
    return _TILE if device.type == "cpu" else _DEVICE_TILE


def largest_item(weight: Tensor, gang: Gang) -> Tensor:
    """Returns the largest absolute value of a sharded table, *Shape:* :math:`()`, in an all-reduce
    of one number."""
    largest = weight.new_zeros((), dtype=torch.float64)
    if weight.numel():
        largest.copy_(torch.stack(torch.aminmax(weight.detach())).abs().amax())
    if gang.size > 1:
        gang.all_reduce(largest, ReduceOperation.MAX)
    return largest


def aligned(tensor: Tensor) -> Tensor:
    """Returns ``tensor``, or a copy of it in memory that is contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor if is_aligned(tensor) else tensor.clone()


def is_aligned(tensor: Tensor) -> bool:
    """Returns whether products of ``tensor`` can't depend on where in memory it is."""
    return tensor.data_ptr() % _ALIGNMENT == 0


class ExactSums:
    """Sums that don't depend on the order of their terms, nor on which rank adds which.

    Rounds each term to a multiple of a power of two, at most :math:`2^{-48} b`, by adding a large
    number to it, so that sums in fp64 are exact (Demmel and Nguyen, "Fast Reproducible
    Floating-Point Summation", 2013).

    :param bound: :math:`b`, at least the sum of the absolute values of the terms of a row, over
        all ranks. *Shape:* :math:`(n)`.
    :param width: the number of terms of a row that are summed side by side, E.
    """

    def __init__(self, bound: Tensor, width: int) -> None:
        bound = bound.double()
        # Between 2^(e+3) and 2^(e+4), where b < 2^e, fp64 has the multiples of 2^(e-49). The offset
        # is in the middle, and so are its sums with any terms.
        _, exponent = torch.frexp(bound)
        self._offset = 1.5 * torch.exp2((exponent + 3).double())
        self._offset = (self._offset + bound * 0.0)[:, None]  # NaN if there is no bound.
        self._sums = bound.new_zeros(len(bound), width)
        self._step = max(1, len(bound))
        if bound.device.type == "cpu":
            self._step = max(1, _ADDED_ITEMS // max(1, width))
        self._rounded = bound.new_empty(self._step, width)
        self._sign = 1

    def add(self, terms: Tensor) -> None:
        """
        :param terms: *Shape:* :math:`(n,E)`. *Dtype:* fp32 or fp64.
        """
        for start in range(0, len(terms), self._step):
            rows = slice(start, start + self._step)
            rounded = self._rounded[: len(terms[rows])]
            rounded.copy_(terms[rows])
            rounded.add_(self._offset[rows], alpha=self._sign)
            self._sums[rows] += rounded
        self._sign = -self._sign  # The next term takes the offset out of the sum.

    def reduce(self, gang: Gang) -> Tensor:
        """Returns the sums over all ranks. *Shape:* :math:`(n,E)`. *Dtype:* fp64. Does one
        all-reduce: 2 (P-1)/P times 8 n E bytes."""
        if self._sign < 0:
            self._sums -= self._offset
        if gang.size > 1:
            gang.all_reduce(self._sums)
        return self._sums
