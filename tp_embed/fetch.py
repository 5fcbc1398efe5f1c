"""The lookup of a batch in a table that is cut over a gang, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tp_embed.distinct import find_distinct
from tp_embed.exchange import (
    ColumnsToAll,
    ColumnsToBlocks,
    Dedup,
    Exchange,
    Place,
    Returned,
    RowsToAll,
    RowsToBlocks,
    Staging,
)
from tp_embed.gang import Gang
from tp_embed.lookup import GradBuffer, as_sparse, sum_all, sum_by_id
from tp_embed.partition import Partition
from tp_embed.sharded_parameter import local

Output = Literal["replicated", "sequence", "shard"]

_EXCHANGES: dict[tuple[int, bool], Callable[..., Exchange]] = {
    (0, False): RowsToAll,
    (0, True): RowsToBlocks,
    (1, False): ColumnsToAll,
    (1, True): ColumnsToBlocks,
}


@dataclass(frozen=True)
class Lookup:
    """How a table is looked up.

    :param pad_idx: the row that gets no gradient.
    :param output: what of the rows each rank gets.
    :param dedup: whether an id that occurs several times is sent once, or ``"auto"``.
    :param sparse: whether the gradient is a coalesced sparse tensor of the rows that were used; see
        :func:`~tp_embed.lookup.keep_coalesced`.
    :param grad_buffer: where to put dense gradients, if not into new memory.
    """

    place: Place
    pad_idx: int | None
    output: Output
    dedup: Dedup
    sparse: bool
    staging: Staging
    grad_buffer: GradBuffer | None


class Request:
    """One lookup of a batch, in two steps without autograd.

    :param ids: rows of the whole table, all in range, the same on every rank. *Shape:* any.
        *Dtype:* int32, int64.
    :param real: what is no padding; if ``None``, all. *Shape:* that of ``ids``. *Dtype:* bool.
    """

    def __init__(self, ids: Tensor, real: Tensor | None, how: Lookup) -> None:
        gang, shape, blocks = how.place.gang, ids.shape, None
        if how.output == "sequence" and gang.size > 1:
            blocks = _sequence_blocks(ids, real, gang)
            own = Partition(shape[-1], gang.size).shard(gang.rank)
            shape = torch.Size((*shape[:-1], len(own)))
            real = None if real is None else real[..., own.start : own.stop]
        elif real is not None:
            ids = ids[real]
        ids = ids.flatten()
        self._how, self._shape = how, shape
        self._kept = None if real is None else real.flatten().nonzero()[:, 0]
        self._exchange: Exchange | _OwnBlock = _OwnBlock(ids)
        if gang.size > 1 and how.output != "shard":
            kind = _EXCHANGES[how.place.dim, blocks is not None]
            self._exchange = kind(how.place, ids, blocks, how.dedup, how.staging)

    def rows(self, weight: Tensor) -> Tensor:
        """The rows that this rank wants of the table, in new memory.

        :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
        :returns: *Shape:* :math:`(*,E)`, or what the output makes of it.
        """
        rows = self._exchange.fetch(weight)
        if self._kept is not None:
            output = rows.new_zeros(self._shape.numel(), rows.size(1))
            rows = output.index_copy_(0, self._kept, rows)
        return rows.view(*self._shape, rows.size(1))

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's block, given that of :meth:`rows`."""
        grad = grad.reshape(self._shape.numel(), grad.size(-1))
        if self._kept is not None:
            grad = grad[self._kept]
        return _gradient(self._exchange.give_back(grad), self._how)


class _OwnBlock:
    """In the place of an exchange, where a rank wants what it holds: the whole table, or its own
    columns of each row."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def fetch(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self._ids)

    def give_back(self, grad: Tensor) -> Returned:
        return Returned(grad, self._ids, None, range(grad.size(1)))


def fetch(weight: Tensor, request: Request) -> Tensor:
    """:meth:`Request.rows`, with its gradient."""
    output: Tensor = _Fetch.apply(weight, request)
    return output


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, request: Request) -> Tensor:
        ctx.request = request
        return request.rows(local(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.request.gradient(grad), None


def _gradient(returned: Returned, how: Lookup) -> Tensor:
    """The gradient of this rank's block."""
    rows, columns = how.place.rows, returned.columns
    if returned.grad.device.type != "cpu" and not how.sparse and returned.distinct is None:
        local = returned.ids - rows.start
        unused = (local < 0) | (local >= len(rows))
        if how.pad_idx is not None:
            unused |= returned.ids == how.pad_idx
        grad = returned.grad[:, columns.start : columns.stop]
        return sum_all(grad, local.masked_fill(unused, -1), len(rows))
    distinct = returned.distinct or find_distinct(returned.ids, returned.positions)
    if how.place.dim == 0:
        distinct = distinct.within(rows)
    if how.pad_idx is not None:
        distinct = distinct.without(how.pad_idx)
    sums = sum_by_id(returned.grad, distinct, columns)
    used = (distinct.ids - rows.start).long()
    if how.sparse:
        return as_sparse(used, sums, len(rows))
    if how.grad_buffer is not None:
        return how.grad_buffer.fill(used, sums, len(rows))
    return sums.new_zeros(len(rows), sums.size(1)).index_copy_(0, used, sums)


def _sequence_blocks(ids: Tensor, real: Tensor | None, gang: Gang) -> list[Tensor]:
    """For each rank its contiguous block of positions along the last dimension, as indices into the
    flat ids, without padding."""
    if not ids.ndim:
        raise ValueError(
            "`x` must have a dimension to cut for the output 'sequence', but has none."
        )
    flat = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    partition = Partition(ids.size(-1), gang.size)
    blocks = []
    for rank in range(gang.size):
        own = partition.shard(rank)
        block = flat[..., own.start : own.stop].flatten()
        blocks.append(block if real is None else block[real.flatten()[block]])
    return blocks
