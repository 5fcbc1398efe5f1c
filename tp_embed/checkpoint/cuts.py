"""Describes how Parameters are cut over tensor-parallel ranks, as a checkpoint records it or as
rules say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from tp_embed.partition import Partition

from .choices import DIMS
from .errors import CheckpointError
from .files.arrays import Array, Index, Joined, Tile
from .files.derived import Copies

# The usual names of token tables and output heads.
TABLES = (
    "*embed_tokens.weight",
    "*word_embeddings.weight",
    "*tok_embeddings.weight",
    "*token_embedding.weight",
    "*wte.weight",
    "*embed_in.weight",
    "*embed_out.weight",
    "*lm_head.weight",
    "*output_layer.weight",
    "shared.weight",
)


@dataclass(frozen=True)
class Cut:
    """The rows or columns of a Parameter that each rank holds.

    :param dim: the dimension that is cut.
    :param ranges: for each rank, the ranges of logical indices it holds, in its order. A Parameter
        stacked from blocks that are cut one by one, such as a fused query-key-value projection,
        has one range per block.
    """

    dim: int
    ranges: tuple[tuple[range, ...], ...]

    @staticmethod
    def even(dim: int, blocks: Sequence[int], num_shards: int) -> Cut:
        """Cuts blocks of sizes ``blocks``, stacked along ``dim``, each as
        :class:`~tp_embed.partition.Partition` does."""
        starts = [sum(blocks[:i]) for i in range(len(blocks))]
        return Cut(
            dim,
            tuple(
                tuple(
                    range(start + own.start, start + own.stop)
                    for start, size in zip(starts, blocks, strict=True)
                    for own in [Partition(size, num_shards).shard(rank)]
                )
                for rank in range(num_shards)
            ),
        )

    @property
    def num_shards(self) -> int:
        return len(self.ranges)

    @property
    def size(self) -> int:
        """The size of the cut dimension of the whole tensor."""
        return sum(len(part) for parts in self.ranges for part in parts)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The sizes of the blocks stacked along the cut dimension.

        :raises CheckpointError: the ranges do not form blocks that are cut one by one.
        """
        blocks, stop = [], 0
        for parts in zip_longest(*self.ranges):
            start = stop
            for part in parts:
                if part is None or (len(part) and part.start != stop):
                    raise CheckpointError(
                        f"A cut must consist of blocks that are cut one by one, but is {self}. Say "
                        "how to cut it with `--rules`."
                    )
                stop += len(part)
            blocks.append(stop - start)
        return tuple(blocks)

    def over(self, num_shards: int) -> Cut:
        """Cuts the same blocks over ``num_shards`` ranks."""
        return (
            self if num_shards == self.num_shards else Cut.even(self.dim, self.blocks, num_shards)
        )

    def shard_shape(self, shape: Sequence[int], rank: int) -> Index:
        """Returns the shape of a rank's shard of a tensor of ``shape``."""
        size = sum(len(part) for part in self.ranges[rank])
        return (*shape[: self.dim], size, *shape[self.dim + 1 :])

    def join(self, what: str, shards: Sequence[Array], shape: Sequence[int]) -> Array:
        """Joins the ranks' ``shards`` to the whole tensor of ``shape``.

        :param what: the tensor's name in messages.
        :raises CheckpointError: a shard has the wrong shape.
        """
        if len(shards) != self.num_shards or self.size != shape[self.dim]:
            raise CheckpointError(
                f"`{what}` must be cut into {len(shards)} shards of {shape[self.dim]} along "
                f"dimension {self.dim}, but its cut splits {self.size} into {self.num_shards}."
            )
        tiles = []
        for rank, (shard, parts) in enumerate(zip(shards, self.ranges, strict=True)):
            expected = self.shard_shape(shape, rank)
            if shard.shape != expected:
                raise CheckpointError(
                    f"Rank {rank}'s shard of `{what}` must have the shape {expected}, but "
                    f"has {shard.shape}. If it is cut otherwise, say how with `--rules`."
                )
            place = 0
            for part in parts:
                start, source = [0] * len(shape), [0] * len(shape)
                start[self.dim], source[self.dim] = part.start, place
                box = (*shape[: self.dim], len(part), *shape[self.dim + 1 :])
                tiles.append(Tile(tuple(start), shard, tuple(source), box))
                place += len(part)
        return Joined(shape, shards[0].dtype, tiles)

    def to_json(self) -> dict[str, Any]:
        ranges = [[[part.start, part.stop] for part in parts] for parts in self.ranges]
        return {"dim": self.dim, "ranges": ranges}

    def __str__(self) -> str:
        return f"dim {self.dim} / {self.num_shards}"


def join(what: str, cut: Cut | None, shards: Sequence[Array]) -> Array:
    """Joins the ranks' shards to a whole tensor. With ``cut=None`` all must be equal."""
    if cut is None:
        return shards[0] if len(shards) == 1 else Copies(what, shards)
    return cut.join(what, shards, whole_shape(what, cut.dim, shards))


def whole_shape(what: str, dim: int, shards: Sequence[Array]) -> Index:
    """Returns the shape of the tensor that is cut into ``shards`` along ``dim``."""
    shape = shards[0].shape
    if dim >= len(shape):
        raise CheckpointError(f"`{what}` must have a dimension {dim} to be cut, but is of {shape}.")
    size = sum(shard.shape[dim] if dim < len(shard.shape) else 0 for shard in shards)
    return (*shape[:dim], size, *shape[dim + 1 :])


@dataclass(frozen=True)
class Rule:
    """Says how Parameters with a matching name are cut.

    :param pattern: a pattern of :mod:`fnmatch`.
    :param dim: the dimension; ``None`` for replicated.
    :param blocks: the sizes of the blocks stacked along ``dim``, or one number: how many blocks of
        equal size.
    :param is_table: matches vocabulary tables or their heads, which ``--dim`` applies to.
    """

    pattern: str
    dim: int | None
    blocks: tuple[int, ...] = (1,)
    is_table: bool = False

    @staticmethod
    def parse(text: str) -> Rule:
        """Parses ``PATTERN=HOW``. HOW is ``replicated``, ``vocab`` or ``embed`` for a table cut
        over its rows or columns, a dimension, ``DIM/N`` for N stacked blocks of the same size, or
        ``DIM:A,B,...`` for blocks of these sizes.

        :raises CheckpointError: ``text`` is no such rule.
        """
        pattern, found, how = text.rpartition("=")
        pattern, how = pattern.strip(), how.strip()
        if found and pattern:
            if how == "replicated":
                return Rule(pattern, None)
            if how in DIMS:
                return Rule(pattern, DIMS[how], is_table=True)  # type: ignore[index]
            dim, many, count = how.partition("/")
            if many and dim.isdecimal() and count.isdecimal() and int(count):
                return Rule(pattern, int(dim), (int(count),))
            dim, several, sizes = how.partition(":")
            blocks = sizes.split(",") if several else ["1"]
            if dim.isdecimal() and all(size.isdecimal() for size in blocks):
                return Rule(pattern, int(dim), tuple(map(int, blocks)))
        raise CheckpointError(
            "A rule must be `PATTERN=HOW`, with HOW one of `replicated`, `vocab`, `embed`, a "
            f"dimension, `DIM/N` or `DIM:A,B,...`, but is `{text}` instead."
        )

    def cut(self, name: str, shape: Sequence[int], num_shards: int) -> Cut | None:
        """Cuts a tensor of ``shape`` over ``num_shards`` ranks."""
        if self.dim is None:
            return None
        if self.dim >= len(shape):
            raise CheckpointError(
                f"`{name}` must have a dimension {self.dim}, which rule `{self.pattern}` cuts, but "
                f"has the shape {tuple(shape)}."
            )
        size, blocks = shape[self.dim], self.blocks
        if len(blocks) == 1:
            count = blocks[0]
            blocks = (size // count,) * count if size % count == 0 else ()
        if sum(blocks) != size:
            raise CheckpointError(
                f"`{name}` must consist of blocks {self.blocks} along dimension {self.dim}, by "
                f"rule `{self.pattern}`, but has {size}."
            )
        return Cut.even(self.dim, blocks, num_shards)


def find_rule(rules: Iterable[Rule], name: str) -> Rule | None:
    """Returns the first of ``rules`` that matches ``name``."""
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


def is_table(rules: Iterable[Rule], name: str) -> bool:
    """Returns whether ``name`` is a vocabulary table, by a rule or by its usual name."""
    rule = find_rule(rules, name)
    if rule is not None and rule.is_table:
        return True
    return any(fnmatchcase(name, pattern) for pattern in TABLES)
