"""Blocks of a dimension that is split over a gang, and collectives of equal blocks, without
autograd, with and without a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_embed._torch_private import unsafe_view
from tp_embed.gang import Gang, graph_ops
from tp_embed.partition import Partition


def in_graph(x: Tensor) -> bool:
    """Returns whether operations on ``x`` are traced, or ``x`` has no values: under
    :func:`torch.compile`, ``make_fx``, a ``FakeTensorMode``, or on the device ``meta``."""
    return x.is_meta or graph_ops.is_recorded(x)


def padded(x: Tensor, dim: int, length: int) -> Tensor:
    """Appends zeros along ``dim``, -1 or -2, up to ``length``."""
    missing = length - x.size(dim)
    if missing == 0:
        return x
    return torch.nn.functional.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing))


def join_blocks(blocks: Tensor, dim: int, length: int) -> Tensor:
    """Concatenates blocks that are stacked along the first dimension, along ``dim``, -1 or -2.
    Only trailing blocks are padded, so one slice removes all padding."""
    joined = blocks.movedim(0, dim - 1).flatten(dim - 1, dim).narrow(dim, 0, length).contiguous()
    # `joined` may be a view of `blocks`, and autograd refuses in-place writes to views.
    output: Tensor = unsafe_view(joined, joined.shape)
    return output


def split_blocks(x: Tensor, dim: int, partition: Partition) -> Tensor:
    """Stacks the blocks of ``dim``, -1 or -2, padded, along a new first dimension."""
    block, size = partition.block, partition.num_shards
    blocks = padded(x, dim, size * block).unflatten(dim, (size, block))
    stacked: Tensor = blocks.movedim(dim - 1, 0).contiguous()
    return stacked


def all_gather(x: Tensor, gang: Gang) -> Tensor:
    """Stacks ``x`` of all ranks. *Shape:* :math:`(P,*)`."""
    if in_graph(x):
        output: Tensor = graph_ops.all_gather(x, gang.size, gang.handle)
        return output
    blocks = x.new_empty((gang.size, *x.shape))
    gang.all_gather(blocks, x)
    return blocks


def reduce_scatter(blocks: Tensor, gang: Gang) -> Tensor:
    """Sums this rank's block of all ranks. *Shape:* :math:`(P,*)` to :math:`(*)`."""
    if in_graph(blocks):
        output: Tensor = graph_ops.reduce_scatter(blocks, gang.handle)
        return output
    own = blocks.new_empty(blocks.shape[1:])
    gang.reduce_scatter(own, blocks)
    return own


def all_to_all(blocks: Tensor, gang: Gang) -> Tensor:
    """Sends block r to rank r. *Shape:* :math:`(P,*)`."""
    if in_graph(blocks):
        output: Tensor = graph_ops.all_to_all(blocks, gang.handle)
        return output
    received = torch.empty_like(blocks)
    gang.all_to_all(received, blocks)
    return received


def unpadded(x: Tensor, dim: int, length: int) -> Tensor:
    """Returns the first ``length`` items of ``dim``, in memory of their own."""
    if x.size(dim) == length:
        return x
    return x.narrow(dim, 0, length).clone(memory_format=torch.contiguous_format)
