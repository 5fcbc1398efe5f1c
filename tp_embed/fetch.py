"""The lookup of ids in a table that is cut over a gang, with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
from tp_embed.lookup import GradBuffer, as_sparse, sum_all, sum_by_id

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
    :param dedup: whether an id that occurs several times is sent once, or ``"auto"``.
    :param sparse: whether the gradient is a coalesced sparse tensor of the rows that were used; see
        :func:`~tp_embed.lookup.keep_coalesced`.
    :param grad_buffer: where to put dense gradients, if not into new memory.
    """

    place: Place
    pad_idx: int | None
    dedup: Dedup
    sparse: bool
    staging: Staging
    grad_buffer: GradBuffer | None


def fetch(weight: Tensor, ids: Tensor, blocks: Sequence[Tensor] | None, how: Lookup) -> Tensor:
    """The rows that this rank wants of a table.

    :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param ids: rows of the whole table, all in range, the same on every rank. *Shape:* :math:`(N)`.
        *Dtype:* int32, int64.
    :param blocks: for each rank the positions in ``ids`` that it wants, ascending. *Shapes:*
        :math:`(N_{rank})`. If ``None``, all ranks want all.
    :returns: *Shape:* :math:`(N,E)` or :math:`(N_{rank},E)`. *Dtype:* that of ``weight``.
    """
    output: Tensor = _Fetch.apply(weight, ids, blocks, how)
    return output


def fetch_own(weight: Tensor, ids: Tensor, how: Lookup) -> Tensor:
    """The same of what this rank holds alone: the whole table, or its own columns of each row."""
    output: Tensor = _FetchOwn.apply(weight, ids, how)
    return output


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, blocks: Sequence[Tensor] | None, how: Lookup
    ) -> Tensor:
        kind = _EXCHANGES[how.place.dim, blocks is not None]
        exchange = kind(how.place, ids, blocks, how.dedup, how.staging)
        ctx.exchange, ctx.how = exchange, how
        return exchange.fetch(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gradient(ctx.exchange.give_back(grad), ctx.how), None, None, None


class _FetchOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, how: Lookup) -> Tensor:
        ctx.ids, ctx.how = ids, how
        return weight.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        returned = Returned(grad, ctx.ids, None, range(grad.size(1)))
        return _gradient(returned, ctx.how), None, None


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
