"""Differentiable collectives, each with its conjugate as the backward.

Follows the convention of Megatron-LM (Shoeybi et al., 2019): a *replicated* activation is the same
on every rank of the gang, and so is its gradient. Bytes are what one rank sends, for a gang of P
ranks; with P = 1 collectives send nothing and return the input unchanged.

All are linear, and support derivatives of any order, forward-mode AD and the transforms of
:mod:`torch.func`, as long as every rank does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tp_embed._torch_private import (
    DisableTorchFunctionSubclass,
    is_legacy_batched,
    is_transformed,
)
from tp_embed.gang import Gang, graph_ops
from tp_embed.gang.blocks import (
    all_gather,
    all_to_all,
    in_graph,
    join_blocks,
    padded,
    reduce_scatter,
    split_blocks,
    unpadded,
)
from tp_embed.partition import Partition, as_slice

# Chunk size for gathering a whole table.
_CHUNK_BYTES = 16 << 20


def gather_columns(x: Tensor, gang: Gang, partition: Partition) -> Tensor:
    """Concatenates the ranks' blocks along the last dimension.

    Forward: one all-gather, (P-1) N B bytes-per-item, where N is the number of items in the other
    dimensions and B the size of the largest block (shorter blocks are sent padded).
    Backward: the slice of this rank, sends nothing.

    :param x: the block of this rank. *Shape:* :math:`(*,E_{rank})`. Any floating dtype.
    :param partition: the partition of the last dimension over the gang.
    :returns: the same on every rank. *Shape:* :math:`(*,E)`.
    """
    if gang.size == 1:
        return x
    return _apply(_Gather(gang, partition), x)


def scatter_columns(x: Tensor, gang: Gang, partition: Partition) -> Tensor:
    """Keeps this rank's block of the last dimension of a replicated activation.

    Forward: the slice of this rank, sends nothing.
    Backward: one all-gather, (P-1) N B bytes-per-item, with N and B as in :func:`gather_columns`.

    :param x: the same on every rank. *Shape:* :math:`(*,E)`.
    :returns: *Shape:* :math:`(*,E_{rank})`.
    """
    if gang.size == 1:
        return x
    return _apply(_Scatter(gang, partition), x)


def reduce_partial(x: Tensor, gang: Gang) -> Tensor:
    """Sums the ranks' partial results, in place.

    Forward: one all-reduce, 2 (P-1)/P n bytes, where n is the size of ``x``.
    Backward: the identity, sends nothing.

    :param x: the partial result of this rank. Overwritten, except under transforms of
        :mod:`torch.func`, forward-mode AD and compilers. *Shape:* :math:`(*)`.
    :returns: the same on every rank. *Shape:* :math:`(*)`.
    """
    if gang.size == 1:
        return x
    return _apply(_Sum(gang, in_place=not is_transformed()), x)


def copy_to_gang(x: Tensor, gang: Gang) -> Tensor:
    """Passes a replicated activation to a computation that is split over the ranks.

    Forward: the identity, sends nothing.
    Backward: one all-reduce of the ranks' partial gradients, 2 (P-1)/P n bytes.

    :param x: the same on every rank. *Shape:* :math:`(*)`.
    :returns: *Shape:* :math:`(*)`.
    """
    if gang.size == 1:
        return x
    return _apply(_Same(gang), x)


def gather_positions(x: Tensor, gang: Gang, positions: Partition) -> Tensor:
    """Gathers the ranks' blocks of positions for a computation that is split over the ranks, as
    Megatron's ``gather_from_sequence_parallel_region`` (Korthikanti et al., 2022).

    Forward: one all-gather, (P-1) N bytes, where N is the size of the largest block (shorter blocks
    are sent padded).
    Backward: one reduce-scatter of the ranks' partial gradients, which sends as much.

    :param x: the block of this rank. *Shape:* :math:`(*,S_{rank},E)`.
    :param positions: the partition of the second to last dimension over the gang.
    :returns: the same on every rank. *Shape:* :math:`(*,S,E)`.
    """
    if gang.size == 1:
        return x
    return _apply(_GatherPositions(gang, positions), x)


def reduce_positions(x: Tensor, gang: Gang, positions: Partition) -> Tensor:
    """Sums the ranks' partial results and keeps this rank's block of positions, as Megatron's
    ``reduce_scatter_to_sequence_parallel_region``. The reverse of :func:`gather_positions`.

    Forward: one reduce-scatter, (P-1) N bytes, where N is the size of the largest block.
    Backward: one all-gather, which sends as much.

    :param x: the partial result of this rank. *Shape:* :math:`(*,S,E)`.
    :param positions: the partition of the second to last dimension over the gang.
    :returns: *Shape:* :math:`(*,S_{rank},E)`.
    """
    if gang.size == 1:
        return x
    return _apply(_SumPositions(gang, positions), x)


def positions_to_columns(x: Tensor, gang: Gang, positions: Partition, columns: Partition) -> Tensor:
    """Exchanges all columns of some positions for some columns of all positions.

    Forward: one all-to-all, (P-1) N b B bytes-per-item, where b and B are the sizes of the largest
    blocks of positions and columns and N the number of items in the other dimensions (shorter
    blocks are sent padded).
    Backward: the reverse all-to-all, which sends as much.

    :param x: *Shape:* :math:`(*,S_{rank},E)`.
    :param positions: the partition of the second to last dimension over the gang.
    :param columns: the partition of the last dimension over the gang.
    :returns: *Shape:* :math:`(*,S,E_{rank})`.
    """
    if gang.size == 1:
        return x
    return _apply(_Exchange(gang, split=(-1, columns), join=(-2, positions)), x)


def all_gather_columns(x: Tensor, gang: Gang, partition: Partition) -> Tensor:
    """:func:`gather_columns` without autograd."""
    if gang.size == 1:
        return x
    return join_blocks(all_gather(padded(x, -1, partition.block), gang), -1, partition.size)


def gather_table(output: Tensor, block: Tensor, dim: int, gang: Gang, partition: Partition) -> None:
    """Gathers the ranks' blocks of a table on every rank, without autograd.

    Collective: all ranks must call it. Sends (P-1) times the largest block, in chunks of 16 MiB,
    and needs about as much memory as one chunk.

    :param output: the table. *Shape:* :math:`(V,E)`. On any device.
    :param block: the block of this rank. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param dim: the sharded dimension: 0 for rows, 1 for columns.
    :param partition: the partition of ``dim`` over the gang.
    """
    with DisableTorchFunctionSubclass():
        block = block.detach()  # Shards refuse to be indexed.
    num_rows, width = output.shape
    step = max(1, _CHUNK_BYTES // (width * output.element_size()))
    if dim == 1:
        for start in range(0, num_rows, step):
            rows = block[start : start + step].to(gang.device)
            output[start : start + step] = all_gather_columns(rows, gang, partition)
        return
    # Gather the first rows of every block, then the next ones, ...
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
            output[as_slice(rows_of_rank)] = parts[rank, : len(rows_of_rank)]


def whole_table(
    block: Tensor,
    dim: int,
    gang: Gang,
    partition: Partition,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns :func:`gather_table` in a new table, on ``device`` or the device of ``block``."""
    shape = list(block.shape)
    shape[dim] = partition.size
    output = block.new_empty(shape, device=device)
    gather_table(output, block, dim, gang, partition)
    return output


def is_batched(grad: Tensor) -> bool:
    """Returns whether ``grad`` is a batch of gradients, by ``is_grads_batched=True``."""
    if torch.compiler.is_compiling():
        return False
    return is_legacy_batched(grad)


def check_sendable(grad: Tensor) -> None:
    """
    :raises ValueError: ``grad`` is a batch of gradients, which collectives don't support.
    """
    if is_batched(grad):
        raise ValueError(
            "`is_grads_batched` must be False where the backward of a sharded layer sends "
            "gradients, but is True instead. Call `torch.autograd.grad` once for each of them."
        )


@dataclass(frozen=True)
class _Gather:
    gang: Gang
    partition: Partition

    def __call__(self, x: Tensor) -> Tensor:
        return all_gather_columns(x, self.gang, self.partition)

    def conjugate(self) -> _Map:
        return _Scatter(self.gang, self.partition)


@dataclass(frozen=True)
class _Scatter:
    gang: Gang
    partition: Partition

    def __call__(self, x: Tensor) -> Tensor:
        own = self.partition.shard(self.gang.rank)
        # Always copy, even a single token: autograd refuses in-place writes to views.
        return x.narrow(-1, own.start, len(own)).clone(memory_format=torch.contiguous_format)

    def conjugate(self) -> _Map:
        return _Gather(self.gang, self.partition)


@dataclass(frozen=True)
class _Sum:
    gang: Gang
    in_place: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if in_graph(x):
            output: Tensor = graph_ops.all_reduce(x, self.gang.handle)
            return output
        # Gradients belong to autograd, which may pass them to other consumers too.
        output = x if self.in_place else x.clone(memory_format=torch.contiguous_format)
        self.gang.all_reduce(output)
        return output

    def conjugate(self) -> _Map:
        return _Same(self.gang)


@dataclass(frozen=True)
class _Same:
    gang: Gang

    def __call__(self, x: Tensor) -> Tensor:
        # If a graph returns a view of its input, torch takes the view outside of the graph again,
        # without this backward.
        return x.clone() if in_graph(x) else x.view_as(x)

    def conjugate(self) -> _Map:
        return _Sum(self.gang)


@dataclass(frozen=True)
class _GatherPositions:
    gang: Gang
    positions: Partition

    def __call__(self, x: Tensor) -> Tensor:
        blocks = all_gather(padded(x, -2, self.positions.block), self.gang)
        return join_blocks(blocks, -2, self.positions.size)

    def conjugate(self) -> _Map:
        return _SumPositions(self.gang, self.positions)


@dataclass(frozen=True)
class _SumPositions:
    gang: Gang
    positions: Partition

    def __call__(self, x: Tensor) -> Tensor:
        own = reduce_scatter(split_blocks(x, -2, self.positions), self.gang)
        return unpadded(own, -2, len(self.positions.shard(self.gang.rank)))

    def conjugate(self) -> _Map:
        return _GatherPositions(self.gang, self.positions)


@dataclass(frozen=True)
class _Exchange:
    """Splits one dimension, -1 or -2, over the ranks, and joins the blocks of the other."""

    gang: Gang
    split: tuple[int, Partition]
    join: tuple[int, Partition]

    def __call__(self, x: Tensor) -> Tensor:
        (split_dim, split), (join_dim, join) = self.split, self.join
        blocks = split_blocks(padded(x, join_dim, join.block), split_dim, split)
        joined = join_blocks(all_to_all(blocks, self.gang), join_dim, join.size)
        return unpadded(joined, split_dim, len(split.shard(self.gang.rank)))

    def conjugate(self) -> _Map:
        return _Exchange(self.gang, self.join, self.split)


_Map = _Gather | _Scatter | _Sum | _Same | _GatherPositions | _SumPositions | _Exchange


def _apply(function: _Map, x: Tensor) -> Tensor:
    # A Function with transforms takes 30 us longer, and the compiler doesn't support `jvp`.
    plain = torch.compiler.is_compiling() or not is_transformed()
    output: Tensor = (_Linear if plain else _LinearTransformed).apply(x, function)
    return output


class _Linear(torch.autograd.Function):
    """A linear function, with its conjugate as the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: _Map) -> Tensor:
        ctx.function = function
        check_sendable(x)
        output = function(x)
        if output is x:
            ctx.mark_dirty(x)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply(ctx.function.conjugate(), grad), None


class _LinearTransformed(torch.autograd.Function):
    """:class:`_Linear` for :mod:`torch.func` and forward-mode AD."""

    @staticmethod
    def forward(x: Tensor, function: _Map) -> Tensor:
        return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Map], output: Tensor) -> None:
        _, ctx.function = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply(ctx.function.conjugate(), grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _apply(ctx.function, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, function: _Map) -> tuple[Tensor, int]:
        return _apply(function, x.movedim(in_dims[0], 0)), 0
