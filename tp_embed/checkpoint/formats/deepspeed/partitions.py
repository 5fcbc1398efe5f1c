"""How ZeRO puts the shards of a tensor-parallel rank, end to end, into the flat tensors of its
data-parallel ranks.

ZeRO 1 and 2 (``stage_1_and_2.py`` of DeepSpeed) put the Parameters of a param group into one flat
tensor, pad its end, and cut that into one partition for each rank. ZeRO 3 (``stage3.py``) cuts each
Parameter, and a rank has its parts of the Parameters of a sub-group in one flat tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple, TypeVar

from ...files.arrays import Array, Joined, Tile, View

# DeepSpeed starts the partitions of ZeRO 1 and 2 at multiples of so many elements.
_ALIGNMENT = 2

# That of DeepSpeed's config.
SUB_GROUP_SIZE = 1_000_000_000

T = TypeVar("T")


class Fragment(NamedTuple):
    """``size`` elements of a shard, from ``start`` on in the flat tensor of ``dp_rank``. The
    fragments of a shard follow each other."""

    dp_rank: int
    start: int
    size: int


@dataclass(frozen=True)
class Flat:
    """A flat tensor that each data-parallel rank has one of.

    :param group: the param group that it belongs to.
    :param size: how many elements it has on each rank.
    :param paddings: how many of them, at its end, the weights are saved without, by rank.
    :param fragments: where shards are, by name, in the order in which they follow each other.
    """

    group: int
    size: int
    paddings: tuple[int, ...]
    fragments: Mapping[str, tuple[Fragment, ...]]


def join_fragments(
    arrays: Sequence[Array], fragments: Sequence[Fragment], shape: Sequence[int]
) -> Array:
    """A shard of ``shape``, from the flat tensors of all data-parallel ranks.

    :raises CheckpointError: the fragments are not those of this shape, or not in the tensors.
    """
    if len(fragments) == 1 and fragments[0].size == prod(shape):
        return View(arrays[fragments[0].dp_rank], shape, offset=fragments[0].start)
    tiles, end = [], 0
    for dp_rank, start, size in fragments:
        tiles.append(Tile((end,), arrays[dp_rank], (start,), (size,)))
        end += size
    return View(Joined((end,), arrays[0].dtype, tiles), shape)


def cut_groups(groups: Sequence[Mapping[str, int]], dp_size: int) -> list[Flat]:
    """The flat tensors of ZeRO 1 and 2: one for each of ``groups``, which have the sizes of their
    shards by name."""
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
    """The order of Parameters in the flat tensors of ZeRO 1 and 2 with ``round_robin_gradients``:
    those of a rank follow each other."""
    return [item for first in range(dp_size) for item in items[first::dp_size]]


def cut_shards(
    groups: Sequence[Mapping[str, int]], dp_size: int, sub_group_size: int
) -> list[Flat]:
    """The flat tensors of ZeRO 3: one for each sub-group, which is full when a rank has
    ``sub_group_size`` elements of it."""
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
