"""The lookup of a batch in a table that is cut over a gang, with its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor

from tp_embed.backward import is_needed_again
from tp_embed.collectives import check_sendable, is_batched
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
from tp_embed.ids import IdCheck
from tp_embed.lookup import GradBuffer, as_sparse, rows_to_sum, sum_all, sum_by_id
from tp_embed.partition import Partition
from tp_embed.sharded_parameter import check_block, local

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
    :param id_check: raises for ids out of range.
    :param compare: raises on all ranks if the ids of one differ.
    """

    place: Place
    pad_idx: int | None
    output: Output
    dedup: Dedup
    sparse: bool
    staging: Staging
    grad_buffer: GradBuffer | None
    id_check: IdCheck
    compare: Callable[[Tensor, Tensor | None], None]


class Request:
    """One lookup of a batch, in two steps without autograd.

    :param ids: rows of the whole table, the same on every rank. *Shape:* any. *Dtype:* int32,
        int64.
    :param real: what is no padding; if ``None``, all. *Shape:* that of ``ids``. *Dtype:* bool.
    :raises IndexError: an id is out of range.
    """

    def __init__(self, ids: Tensor, real: Tensor | None, how: Lookup) -> None:
        self.memory = ids.data_ptr()
        how.id_check(ids, how.place.num_rows, how.place.gang)
        if ids.device.type != "cpu":  # Where the error for ids out of range is a step late.
            ids = ids.clamp(0, how.place.num_rows - 1)
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
        """The rows that this rank wants of the table, in new memory, and no view.

        :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
        :returns: *Shape:* :math:`(*,E)`, or what the output makes of it.
        :raises ValueError: ``weight`` is of another size.
        """
        place = self._how.place
        check_block(weight, place.gang, place.partition, place.dim)
        rows = self._exchange.fetch(weight)
        if self._kept is not None:
            padded = rows.new_zeros(self._shape.numel(), rows.size(1))
            rows = padded.index_copy_(0, self._kept, rows)
        # A view that an autograd function returns could not be written to in place.
        output: Tensor = torch.ops.aten._unsafe_view(rows, [*self._shape, rows.size(1)])
        return output

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's block, given that of :meth:`rows`."""
        if isinstance(self._exchange, (RowsToBlocks, ColumnsToBlocks)):
            check_sendable(grad)
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


class _Call:
    """A lookup for autograd. Its request is kept from the forward to the last backward."""

    def __init__(self, how: Lookup) -> None:
        self.how = how
        self._request: Request | None = None

    def request(self, ids: Tensor, real: Tensor | None) -> Request:
        """For ``ids``, which autograd has kept, or a hook has made anew."""
        request = self._request
        if request is None or request.memory != ids.data_ptr():
            request = Request(ids, real, self.how)
        self._request = request if is_needed_again() else None
        return request


def fetch(weight: Tensor, ids: Tensor, real: Tensor | None, how: Lookup) -> Tensor:
    """The rows of the table that this rank wants, with their gradients of any order.

    :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param ids: as for :class:`Request`; ``real`` likewise.
    """
    output: Tensor = _Fetch.apply(weight, ids, real, _Call(how))
    return output


class _Saving(torch.autograd.Function):
    """Keeps the ids, so that autograd raises if they are changed before the backward."""

    def __init_subclass__(cls) -> None:
        # torch asks for it in every call, and to find it takes longer than a small lookup.
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ids, real, ctx.call = inputs
        ctx.save_for_backward(ids, real)
        ctx.save_for_forward(ids, real)


class _Fetch(_Saving):
    """Rows for ids. Its backward sums gradients per id: each is the transpose of the other."""

    @staticmethod
    def forward(weight: Tensor, ids: Tensor, real: Tensor | None, call: _Call) -> Tensor:
        call.how.compare(ids, real)  # Before any rank looks at its own.
        return call.request(ids, real).rows(local(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.call.how.sparse and torch.is_grad_enabled():
            raise RuntimeError(
                "`sparse` must be False for derivatives of a gradient (`create_graph=True`) and "
                "for `torch.func`, but is True instead. Make the table with `sparse=False`."
            )
        return _SumById.apply(grad, *ctx.saved_tensors, ctx.call), None, None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, *_: Any) -> Tensor:
        ids, real = ctx.saved_tensors
        return fetch(weight, ids, real, ctx.call.how)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        weight, ids, real, call = inputs
        if in_dims[0] is not None:
            return _one_by_one(_Fetch, info, in_dims, inputs)
        if call.how.output == "sequence" and ids.ndim == 1:
            raise _no_sequence()
        # More ids of one table are one lookup.
        ids, real = _batched(ids, in_dims[1], info), _batched(real, in_dims[2], info)
        return fetch(weight, ids, real, call.how), 0


class _SumById(_Saving):
    @staticmethod
    def forward(grad: Tensor, ids: Tensor, real: Tensor | None, call: _Call) -> Tensor:
        return call.request(ids, real).gradient(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        how = ctx.call.how
        ids, real = ctx.saved_tensors
        return fetch(without_pad(grad, how), ids, real, how), None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Tensor:
        output: Tensor = _SumById.apply(grad, *ctx.saved_tensors, _Call(ctx.call.how))
        return output

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        return _one_by_one(_SumById, info, in_dims, inputs)


def without_pad(block: Tensor, how: Lookup) -> Tensor:
    """``block`` of a table with zeros in the pad row, which gets no gradient."""
    if how.pad_idx is None or how.pad_idx not in how.place.rows:
        return block
    row = how.pad_idx - how.place.rows.start
    # Made on the device: from a list it would be copied there, for which CUDA waits.
    return block.index_fill(0, torch.arange(row, row + 1, device=block.device), 0)


def _one_by_one(
    function: type[_Saving], info: Any, in_dims: Any, inputs: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """The function of each item of a batch, as for tables of an ensemble."""
    parts = [_batched(x, dim, info) for x, dim in zip(inputs[:3], in_dims[:3], strict=True)]
    items = zip(*(repeat(None) if part is None else part for part in parts), strict=False)
    return torch.stack([function.apply(*item, _Call(inputs[3].how)) for item in items]), 0


def _batched(x: Any, dim: int | None, info: Any) -> Any:
    """``x`` with a batch in the first dimension; ``None`` stays."""
    if x is None:
        return None
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def _gradient(returned: Returned, how: Lookup) -> Tensor:
    """The gradient of this rank's block."""
    rows, columns = how.place.rows, returned.columns
    if returned.grad.device.type != "cpu" and not how.sparse and returned.distinct is None:
        grad = returned.grad[:, columns.start : columns.stop]
        return sum_all(grad, rows_to_sum(returned.ids, rows, how.pad_idx), len(rows))
    distinct = returned.distinct or find_distinct(returned.ids, returned.positions)
    if how.place.dim == 0:
        distinct = distinct.within(rows)
    if how.pad_idx is not None:
        distinct = distinct.without(how.pad_idx)
    sums = sum_by_id(returned.grad, distinct, columns)
    used = (distinct.ids - rows.start).long()
    if how.sparse:
        return as_sparse(used, sums, len(rows))
    if how.grad_buffer is not None and sums.device.type == "cpu" and not is_batched(sums):
        return how.grad_buffer.fill(used, sums, len(rows))
    return sums.new_zeros(len(rows), sums.size(1)).index_copy_(0, used, sums)


def _no_sequence() -> ValueError:
    return ValueError("`x` must have a dimension to cut for the output 'sequence', but has none.")


def _sequence_blocks(ids: Tensor, real: Tensor | None, gang: Gang) -> list[Tensor]:
    """For each rank its contiguous block of positions along the last dimension, as indices into the
    flat ids, without padding."""
    if not ids.ndim:
        raise _no_sequence()
    flat = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    partition = Partition(ids.size(-1), gang.size)
    blocks = []
    for rank in range(gang.size):
        own = partition.shard(rank)
        block = flat[..., own.start : own.stop].flatten()
        blocks.append(block if real is None else block[real.flatten()[block]])
    return blocks
