"""Moves rows of a table between the ranks of a gang."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.partition import Partition, as_slice, within


def redistribute(block: Tensor, old: Partition, new: Partition, gang: Gang) -> Tensor:
    """Moves rows of a table from the shards of one partition to the shards of another, by one
    all-to-all. Drops rows beyond the size of ``new``. Rows beyond the size of ``old`` are missing.

    :param block: the shard of this rank. *Shape:* :math:`(V_{rank},E)`.
    """
    ranks = range(gang.size)
    return move_rows(block, list(map(old.shard, ranks)), list(map(new.shard, ranks)), gang)


def move_rows(block: Tensor, held: Sequence[range], wanted: Sequence[range], gang: Gang) -> Tensor:
    """Moves rows of a table between the ranks of a gang, by one all-to-all.

    :param block: the rows ``held[rank]`` of this rank, of any dtype. *Shape:* :math:`(N,*)`.
    :param held: the rows of each rank: a part of its block or of its cyclic shard.
    :param wanted: the rows that each rank gets, likewise.
    :returns: the rows ``wanted[rank]``, without those that no rank holds.
    """
    own, mine = held[gang.rank], wanted[gang.rank]
    sent = [_indices(own, rows) for rows in wanted]
    places = [_indices(mine, rows) for rows in held]
    kept = torch.cat([block[as_slice(rows)] for rows in sent]).to(gang.device)
    counts = [len(rows) for rows in places]
    received = kept.new_empty(sum(counts), *block.shape[1:])
    gang.all_to_all(sendable(received), sendable(kept), counts, [len(rows) for rows in sent])
    output = torch.empty_like(received)
    for rows, part in zip(places, received.split(counts), strict=True):
        output[as_slice(rows)] = part
    return output.to(block.device)


def sendable(tensor: Tensor) -> Tensor:
    """Returns a view of ``tensor`` that gloo and NCCL send: they know no int16."""
    return tensor.view(torch.float16) if tensor.dtype == torch.int16 else tensor


def _indices(shard: range, other: range) -> range:
    """Returns which items of ``shard`` are in ``other`` as well: two blocks, two cyclic shards over
    as many ranks, or one of each."""
    if other.step == 1:
        return range(len(shard))[within(shard, other.start, other.stop)]
    if shard.step == other.step:
        return range(min(len(shard), len(other)) if shard.start == other.start else 0)
    both = other[within(other, shard.start, shard.stop)]
    return range(both.start - shard.start, both.stop - shard.start, both.step)
