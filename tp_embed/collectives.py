"""Collectives that autograd can go through, each with its conjugate as the backward.

The convention is that of Megatron-LM (Shoeybi et al., 2019): a *replicated* activation is the same
on every rank of the gang, and so is its gradient. Bytes are what one rank sends, for a gang of P
ranks; with P = 1 nothing is sent and the input is returned as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tp_embed import compiled
from tp_embed.gang import Gang
from tp_embed.partition import Partition

# How much of a table travels at once where all of it has to.
_CHUNK_BYTES = 16 << 20


def gather_columns(x: Tensor, gang: Gang, partition: Partition) -> Tensor:
    """Puts the ranks' blocks of the last dimension together.

    Forward: one all-gather, (P-1) N B bytes-per-item, where N is the number of items in the other
    dimensions and B the size of the largest block (shorter blocks travel padded).
    Backward: the slice of this rank, nothing is sent.

    :param x: the block of this rank. *Shape:* :math:`(*,E_{rank})`. Any floating dtype.
    :param partition: how the last dimension is cut over the gang.
    :returns: the same on every rank. *Shape:* :math:`(*,E)`.
    """
    if gang.size == 1:
        return x
    output: Tensor = _GatherColumns.apply(x, gang, partition)
    return output


def scatter_columns(x: Tensor, gang: Gang, partition: Partition) -> Tensor:
    """Keeps this rank's block of the last dimension of a replicated activation.

    Forward: the slice of this rank, nothing is sent.
    Backward: one all-gather, (P-1) N B bytes-per-item, with N and B as in :func:`gather_columns`.

    :param x: the same on every rank. *Shape:* :math:`(*,E)`.
    :returns: *Shape:* :math:`(*,E_{rank})`.
    """
    if gang.size == 1:
        return x
    output: Tensor = _ScatterColumns.apply(x, gang, partition)
    return output


def reduce_partial(x: Tensor, gang: Gang) -> Tensor:
    """Adds up the ranks' partial results, in place.

    Forward: one all-reduce, 2 (P-1)/P n bytes, n being the size of ``x``.
    Backward: the identity, nothing is sent.

    :param x: the part of this rank; it is overwritten. *Shape:* :math:`(*)`.
    :returns: the same on every rank. *Shape:* :math:`(*)`.
    """
    if gang.size == 1:
        return x
    output: Tensor = _ReducePartial.apply(x, gang)
    return output


def copy_to_gang(x: Tensor, gang: Gang) -> Tensor:
    """Hands a replicated activation to work that each rank does a part of.

    Forward: the identity, nothing is sent.
    Backward: one all-reduce of the ranks' partial gradients, 2 (P-1)/P n bytes.

    :param x: the same on every rank. *Shape:* :math:`(*)`.
    :returns: *Shape:* :math:`(*)`.
    """
    if gang.size == 1:
        return x
    output: Tensor = _CopyToGang.apply(x, gang)
    return output


def all_gather_columns(x: Tensor, gang: Gang, partition: Partition) -> Tensor:
    """:func:`gather_columns` without autograd."""
    if gang.size == 1:
        return x
    width, block = x.size(-1), partition.block
    # Only trailing blocks are short, so the padding ends up behind column E: one slice removes it.
    if width < block:
        x = torch.nn.functional.pad(x, (0, block - width))
    if torch.compiler.is_compiling():
        blocks: Tensor = compiled.all_gather(x, gang.size, gang.handle)
    else:
        blocks = x.new_empty((gang.size, *x.shape))  # (P, *, B)
        gang.all_gather(blocks, x)
    columns = blocks.movedim(0, -2).flatten(-2)  # (*, P x B)
    return columns[..., : partition.size].contiguous()


def gather_table(output: Tensor, block: Tensor, dim: int, gang: Gang, partition: Partition) -> None:
    """Puts the ranks' blocks of a table together, on every rank, without autograd.

    All ranks have to call it. It sends (P-1) times the largest block, in chunks of 16 MiB, which is
    about what it needs of memory.

    :param output: the table. *Shape:* :math:`(V,E)`. On any device.
    :param block: the block of this rank. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param dim: the dimension that is cut over the gang: 0, the rows, or 1, the columns.
    :param partition: how it is cut.
    """
    num_rows, width = output.shape
    step = max(1, _CHUNK_BYTES // (width * output.element_size()))
    if dim == 1:
        for start in range(0, num_rows, step):
            rows = block[start : start + step].to(gang.device)
            output[start : start + step] = all_gather_columns(rows, gang, partition)
        return
    # The first rows of every block, then the next ones, ...
    step = max(1, step // gang.size)
    for start in range(0, partition.block, step):
        length = min(step, partition.block - start)
        own = block[start : start + length]
        padded = own.new_zeros((length, width), device=gang.device)
        padded[: len(own)] = own
        parts = padded.new_empty((gang.size, length, width))
        gang.all_gather(parts, padded)
        for rank in range(gang.size):
            rows_of_rank = partition.shard(rank)[start : start + length]
            output[rows_of_rank.start : rows_of_rank.stop] = parts[rank, : len(rows_of_rank)]


def whole_table(
    block: Tensor,
    dim: int,
    gang: Gang,
    partition: Partition,
    device: torch.device | str | None = None,
) -> Tensor:
    """:func:`gather_table` into a new table, on ``device`` or else that of ``block``."""
    shape = list(block.shape)
    shape[dim] = partition.size
    output = block.new_empty(shape, device=device)
    gather_table(output, block, dim, gang, partition)
    return output


def _own_columns(x: Tensor, gang: Gang, partition: Partition) -> Tensor:
    own = partition.shard(gang.rank)
    return x.narrow(-1, own.start, len(own)).contiguous()


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gang: Gang, partition: Partition) -> Tensor:
        ctx.gang, ctx.partition = gang, partition
        return all_gather_columns(x, gang, partition)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own_columns(grad, ctx.gang, ctx.partition), None, None


class _ScatterColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gang: Gang, partition: Partition) -> Tensor:
        ctx.gang, ctx.partition = gang, partition
        return _own_columns(x, gang, partition)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_columns(grad, ctx.gang, ctx.partition), None, None


class _ReducePartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gang: Gang) -> Tensor:
        if torch.compiler.is_compiling():
            output: Tensor = compiled.all_reduce(x, gang.handle)
            return output
        ctx.mark_dirty(x)
        gang.all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _CopyToGang(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gang: Gang) -> Tensor:
        ctx.gang = gang
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.compiler.is_compiling():
            return compiled.all_reduce(grad, ctx.gang.handle), None
        # The gradient belongs to autograd, which may hand it to another consumer too.
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.gang.all_reduce(grad)
        return grad, None
