"""Computes how ZeRO packs a tensor-parallel rank's shards into the flat tensors of its
data-parallel ranks.

ZeRO 1 and 2 (``stage_1_and_2.py`` of DeepSpeed) concatenate the Parameters of a param group into
one flat tensor, pad its end, and cut it into one partition per rank. ZeRO 3 (``stage3.py``) cuts
each Parameter, and a rank concatenates its parts of a sub-group's Parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple, TypeVar

from ...files.arrays import Array, Joined, Tile, View

# DeepSpeed aligns the partitions of ZeRO 1 and 2 to this many elements.
_ALIGNMENT = 2

# The default of DeepSpeed's config.
SUB_GROUP_SIZE = 1_000_000_000

T = TypeVar("T")


class Fragment(NamedTuple):
    """``size`` elements of a shard, at ``start`` in the flat tensor of ``dp_rank``. A shard is the
    concatenation of its fragments."""

    dp_rank: int
    start: int
    size: int


@dataclass(frozen=True)
class Flat:
    """A flat tensor, one on each data-parallel rank.

    :param group: the index of its param group.
    :param size: the number of elements on each rank.
    :param paddings: the number of padding elements at its end, by rank. Weights are saved without.
    :param fragments: the fragments of each shard by name, in the order of the flat tensor.
    """

    group: int
    size: int
    paddings: tuple[int, ...]
    fragments: Mapping[str, tuple[Fragment, ...]]


def join_fragments(
    arrays: Sequence[Array], fragments: Sequence[Fragment], shape: Sequence[int]
) -> Array:
    """Assembles a shard of ``shape`` from the flat tensors of all data-parallel ranks.

    :raises CheckpointError: the fragments do not fit the shape or the tensors.
    """
    if len(fragments) == 1 and fragments[0].size == prod(shape):
        return View(arrays[fragments[0].dp_rank], shape, offset=fragments[0].start)
    tiles, end = [], 0
    for dp_rank, start, size in fragments:
        tiles.append(Tile((end,), arrays[dp_rank], (start,), (size,)))
        end += size
    return View(Joined((end,), arrays[0].dtype, tiles), shape)


def cut_groups(groups: Sequence[Mapping[str, int]], dp_size: int) -> list[Flat]:
    """Returns the flat tensors of ZeRO 1 and 2, one per group. ``groups`` map names to sizes of
    shards."""
    flats = []
    for index, sizes in enumerate(groups):
        total = sum(sizes.values())
        part = ceil(total / (_ALIGNMENT * dp_size)) * _ALIGNMENT
        fragments, begin = {}, 0
        for name, size in sizes.items():
            fragments[name] = tuple(
                Fragment(dp_rank, first - dp_rank * part, last - first)
                for dp_rank in range(dp_size)
                for first in [max(begin, dp_rank * part)]
                for last in [min(begin + size, (dp_rank + 1) * part)]
                if first < last
            )
            begin += size
        paddings = tuple(
            min(part, max(0, (dp_rank + 1) * part - total)) for dp_rank in range(dp_size)
        )
        flats.append(Flat(index, part, paddings, fragments))
    return flats


def round_robin(items: Sequence[T], dp_size: int) -> list[T]:
    """Reorders Parameters as ZeRO 1 and 2 do with ``round_robin_gradients``: grouped by rank."""
    return [item for first in range(dp_size) for item in items[first::dp_size]]


def cut_shards(
    groups: Sequence[Mapping[str, int]], dp_size: int, sub_group_size: int
) -> list[Flat]:
    """Returns the flat tensors of ZeRO 3, one per sub-group. A sub-group is full when each rank has
    ``sub_group_size`` elements."""
    flats = []
    for index, sizes in enumerate(groups):
        fragments: dict[str, tuple[Fragment, ...]] = {}
        start, last = 0, [*sizes][-1:]
        for name, size in sizes.items():
            part = ceil(size / dp_size)
            fragments[name] = tuple(
                Fragment(dp_rank, start, min(part, size - dp_rank * part))
                for dp_rank in range(dp_size)
                if dp_rank * part < size
            )
            start += part
            if start >= sub_group_size or [name] == last:
                flats.append(Flat(index, start, (0,) * dp_size, fragments))
                fragments, start = {}, 0
    return flats
