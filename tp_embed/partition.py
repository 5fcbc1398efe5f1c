"""Splits one dimension of a table over the ranks of a gang: pure arithmetic, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# Shards count as equally large up to this ratio of their sizes.
_SIZE_TOLERANCE = 1.1


@dataclass(frozen=True, slots=True)
class Partition:
    """Splits ``size`` consecutive items into one shard per rank: a contiguous block, or every
    ``num_shards``-th item if ``cyclic``.

    Every rank holds a block of ``ceil(size / num_shards)`` items until none are left, so the last
    block may be shorter and blocks after it are empty, as with :func:`torch.chunk` and DTensor's
    ``Shard``, but keeping empty blocks. Cyclic shards differ by at most one item.

    >>> Partition(10, 4).sizes
    (3, 3, 3, 1)
    >>> Partition(10, 4, cyclic=True).shard(1)
    range(1, 10, 4)

    :raises ValueError: ``size`` is negative or ``num_shards`` is less than 1.
    """

    size: int
    num_shards: int
    cyclic: bool = False

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(
                f"`size` must be greater than or equal to 0, but is {self.size} instead."
            )
        if self.num_shards < 1:
            raise ValueError(
                "`num_shards` must be greater than or equal to 1, "
                f"but is {self.num_shards} instead."
            )

    @property
    def block(self) -> int:
        """The size of the largest shard, and of every shard if the split is even."""
        return -(-self.size // self.num_shards)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of items of each shard, by rank. The sum is ``size``."""
        return tuple(len(self.shard(rank)) for rank in range(self.num_shards))

    def shard(self, rank: int) -> range:
        """Returns the items of ``rank``, as a range of logical indices; empty if none are left.

        :raises ValueError: ``rank`` is not in ``[0, num_shards)``.
        """
        if not 0 <= rank < self.num_shards:
            raise ValueError(f"`rank` must be in [0, {self.num_shards}), but is {rank} instead.")
        if self.cyclic:
            return range(rank, self.size, self.num_shards)
        start = min(rank * self.block, self.size)
        return range(start, min(start + self.block, self.size))

    def position(self, item: Any) -> Any:
        """Returns where ``item`` is if all shards are padded to ``block`` items and joined:
        ``rank * block + index`` for an item at ``index`` in the shard of ``rank``.

        :param item: an integer, or an integer tensor.
        """
        if self.cyclic:
            return item % self.num_shards * self.block + item // self.num_shards
        return item


def as_slice(items: range, first: int = 0) -> slice:
    """Returns the slice that selects ``items`` from a part that starts at item ``first``."""
    return slice(items.start - first, items.stop - first, items.step) if items else slice(0)


def within(items: range, start: int, stop: int) -> slice:
    """Returns which of the ascending ``items`` are in ``[start, stop)``.

    >>> within(range(1, 10, 4), 2, 6)
    slice(1, 2, None)
    """
    first, last = (
        len(range(items.start, min(bound, items.stop), items.step)) for bound in (start, stop)
    )
    return slice(first, last)


def describe(items: range) -> str:
    """Returns ``items`` as the slice of a table in Python's syntax."""
    step = "" if items.step == 1 else f":{items.step}"
    return f"{items.start}:{items.stop}{step}"


def auto_strategy(
    num_embeddings: int, embed_dim: int, num_shards: int, *, tied: bool
) -> Literal["embed", "vocab"]:
    """Chooses the strategy for ``"auto"`` of :func:`tp_embed.shard_embeddings`. If the largest
    shards of the two differ by more than a tenth, takes the smaller one. Otherwise takes
    ``"vocab"`` for a table that is tied to a head, whose logits can then stay sharded, and
    ``"embed"`` for other tables, since it sends less.

    >>> auto_strategy(128_000, 4096, 8, tied=False)
    'embed'
    """
    by_rows = Partition(num_embeddings, num_shards).block * embed_dim
    by_columns = num_embeddings * Partition(embed_dim, num_shards).block
    if tied:
        return "vocab" if by_rows <= _SIZE_TOLERANCE * by_columns else "embed"
    return "embed" if by_columns <= _SIZE_TOLERANCE * by_rows else "vocab"


def overlap(first: range, second: range) -> int:
    """Returns how many items two blocks share."""
    return max(0, min(first.stop, second.stop) - max(first.start, second.start))
