"""The lookup of a batch in a table that is cut over a gang, with its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from tp_embed._torch_private import unsafe_view
from tp_embed.batch_layout import BatchLayout
from tp_embed.gang import Gang
from tp_embed.gang.collectives import check_sendable, is_batched
from tp_embed.gang.graph_ops import is_traced, register
from tp_embed.gang.graph_ops import look_up as look_up_in_graph
from tp_embed.lookup.backward import is_needed_again
from tp_embed.lookup.distinct import find_distinct
from tp_embed.lookup.exchange import (
    ColumnsToAll,
    ColumnsToBlocks,
    Exchange,
    Place,
    ReturnedGrads,
    RowsToAll,
    RowsToBlocks,
    Staging,
)
from tp_embed.lookup.gradient import (
    GradBuffer,
    as_sparse,
    check_sparse,
    keep_coalesced,
    rows_to_sum,
    sum_all,
    sum_by_id,
)
from tp_embed.lookup.ids import IdCheck, as_indices
from tp_embed.lookup.options import LookupOptions
from tp_embed.lookup.same_ids import SameIds, check_interval
from tp_embed.parameter.sharded import check_block, local, unguarded
from tp_embed.partition import Partition

_EXCHANGES: dict[tuple[int, bool], Callable[..., Exchange]] = {
    (0, False): RowsToAll,
    (0, True): RowsToBlocks,
    (1, False): ColumnsToAll,
    (1, True): ColumnsToBlocks,
}


class Lookup:
    """The lookups of one table: where its block is, its options, and what is kept between steps.

    A graph of torch.compile names it by its ``handle``; see :mod:`tp_embed.gang.graph_ops`.

    :param pad_idx: the row that gets no gradient.
    :param name: what errors call the table, the same on every rank.
    """

    def __init__(
        self, place: Place, pad_idx: int | None, options: LookupOptions, name: str
    ) -> None:
        self.place, self.pad_idx, self.name = place, pad_idx, name
        self.output, self.dedup, self.sparse = options.output, options.dedup, options.sparse
        self.staging = Staging()
        self.grad_buffer = GradBuffer() if options.reuse_grad else None
        self.id_check = IdCheck()
        self.same_ids = SameIds(check_interval(options.check_ids))
        self.handle = register(self)

    def compare(self, ids: Tensor, valid: Tensor | None) -> None:
        """Raises on all ranks if the ids of one differ, before any looks at its own."""
        self.same_ids(ids, valid, self.place.gang, self.name)

    def flush(self) -> None:
        """Waits until the ids of all lookups so far are checked."""
        self.same_ids.flush()
        self.id_check.flush()

    def rows_in_graph(self, weight: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
        """The forward in a graph."""
        self.compare(ids, valid)
        return Request(ids, valid, self).rows(local(weight))

    def gradient_in_graph(self, grad: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
        """The backward in a graph, which may write to its gradients without torch counting it: they
        are in new memory."""
        return Request(ids, valid, self).gradient(grad, into=None)

    def without_pad_row(self, block: Tensor) -> Tensor:
        """``block`` of a table with zeros in the pad row, which gets no gradient."""
        if self.pad_idx is None or self.pad_idx not in self.place.rows:
            return block
        row = self.pad_idx - self.place.rows.start
        # Made on the device: from a list it would be copied there, for which CUDA waits.
        return block.index_fill(0, torch.arange(row, row + 1, device=block.device), 0)

    def output_shape(self, ids: Tensor) -> list[int]:
        """The shape of the output. Sizes of ``ids`` may be symbols, which ``range`` does not
        take."""
        place, shape = self.place, list(ids.shape)
        width = place.num_columns
        if self.output == "shard":
            width = len(place.columns)
        elif self.output == "sequence" and shape:
            block = -(-shape[-1] // place.gang.size)
            start = min(place.gang.rank * block, shape[-1])
            shape[-1] = min(start + block, shape[-1]) - start
        return [*shape, width]


def look_up(table: Lookup, weight: Tensor, x: Tensor, layout: BatchLayout | None) -> Tensor:
    """The rows of the table that this rank wants, with their gradients of any order.

    :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param x: rows of the whole table, the same on every rank. *Shape:* any. *Dtype:* any integer.
    :param layout: of ``x``. Padded positions return zeros, get no gradient, and are not
        range-checked.
    :returns: *Shape:* :math:`(*,E)`, or what the output makes of it.
    :raises TypeError: ``x`` does not have an integer dtype.
    :raises ValueError: ``layout`` or ``weight`` is of another shape.
    :raises IndexError: an id is out of range.
    :raises GangError: the ids of a rank differ.
    """
    ids = as_indices(x)
    valid = None if layout is None else _valid(ids, layout)
    if valid is not None:
        ids = ids.masked_fill(~valid, 0)
    output: Tensor
    if not is_traced(ids, weight):
        output = _with_gradient(table, weight, ids, valid)
    elif table.sparse:
        output = _outside_of_graph(table, weight, ids, valid)
    else:
        with unguarded():
            output = look_up_in_graph(weight, ids, valid, table.output_shape(ids), table.handle)
    return output


def _valid(ids: Tensor, layout: BatchLayout) -> Tensor | None:
    """Where there is no padding, if there is any. *Shape:* that of ``ids``. *Dtype:* bool."""
    positions = layout.position_indices
    if positions.shape != ids.shape:
        raise ValueError(
            f"`layout` must be of the shape of `x`, {tuple(ids.shape)}, but is of "
            f"{tuple(positions.shape)} instead. Make it with `BatchLayout.of(x, ...)`."
        )
    return positions.to(ids.device) >= 0 if layout.padded else None


def _with_gradient(table: Lookup, weight: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
    if table.sparse:
        check_sparse(weight)
        keep_coalesced(weight)
    return fetch(weight, ids, valid, table)


_outside_of_graph = torch.compiler.disable(
    _with_gradient, reason="A graph has no sparse gradients: pass `sparse=False`."
)


class Request:
    """One lookup of a batch, in two steps without autograd.

    :param ids: rows of the whole table, the same on every rank. *Shape:* any. *Dtype:* int32,
        int64.
    :param valid: what is no padding; if ``None``, all. *Shape:* that of ``ids``. *Dtype:* bool.
    :raises IndexError: an id is out of range.
    """

    def __init__(self, ids: Tensor, valid: Tensor | None, table: Lookup) -> None:
        self.memory = ids.data_ptr()
        table.id_check(ids, table.place.num_rows, table.place.gang)
        if ids.device.type != "cpu":  # Where the error for ids out of range is a step late.
            ids = ids.clamp(0, table.place.num_rows - 1)
        gang, shape, blocks = table.place.gang, ids.shape, None
        if table.output == "sequence" and gang.size > 1:
            blocks = _sequence_blocks(ids, valid, gang)
            own = Partition(shape[-1], gang.size).shard(gang.rank)
            shape = torch.Size((*shape[:-1], len(own)))
            valid = None if valid is None else valid[..., own.start : own.stop]
        elif valid is not None:
            ids = ids[valid]
        ids = ids.flatten()
        self._table, self._shape = table, shape
        self._kept = None if valid is None else valid.flatten().nonzero()[:, 0]
        self._exchange: Exchange | _OwnBlock = _OwnBlock(ids)
        if gang.size > 1 and table.output != "shard":
            kind = _EXCHANGES[table.place.dim, blocks is not None]
            self._exchange = kind(table.place, ids, blocks, table.dedup, table.staging)

    def rows(self, weight: Tensor) -> Tensor:
        """The rows that this rank wants of the table, in new memory, and no view.

        :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
        :returns: *Shape:* :math:`(*,E)`, or what the output makes of it.
        :raises ValueError: ``weight`` is of another size.
        """
        place = self._table.place
        check_block(weight, place.gang, place.partition, place.dim)
        rows = self._exchange.fetch(weight)
        if self._kept is not None:
            padded = rows.new_zeros(self._shape.numel(), rows.size(1))
            rows = padded.index_copy_(0, self._kept, rows)
        # A view that an autograd function returns could not be written to in place.
        output: Tensor = unsafe_view(rows, [*self._shape, rows.size(1)])
        return output

    def gradient(self, grad: Tensor, into: GradBuffer | None) -> Tensor:
        """The gradient of this rank's block, given that of :meth:`rows`.

        :param into: where to put it if it is dense; if ``None``, into new memory.
        """
        if isinstance(self._exchange, (RowsToBlocks, ColumnsToBlocks)):
            check_sendable(grad)
        grad = grad.reshape(self._shape.numel(), grad.size(-1))
        if self._kept is not None:
            grad = grad[self._kept]
        return _gradient(self._exchange.backward(grad), self._table, into)


class _OwnBlock:
    """In the place of an exchange, where a rank wants what it holds: the whole table, or its own
    columns of each row."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def fetch(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self._ids)

    def backward(self, grad: Tensor) -> ReturnedGrads:
        return ReturnedGrads(grad, self._ids, None, range(grad.size(1)))


class _Call:
    """A lookup for autograd. Its request is kept from the forward to the last backward."""

    def __init__(self, table: Lookup) -> None:
        self.table = table
        self._request: Request | None = None

    def request(self, ids: Tensor, valid: Tensor | None) -> Request:
        """For ``ids``, which autograd has kept, or a hook has made anew."""
        request = self._request
        if request is None or request.memory != ids.data_ptr():
            request = Request(ids, valid, self.table)
        self._request = request if is_needed_again() else None
        return request


def fetch(weight: Tensor, ids: Tensor, valid: Tensor | None, table: Lookup) -> Tensor:
    """The rows of the table that this rank wants, with their gradients of any order.

    :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param ids: as for :class:`Request`; ``valid`` likewise.
    """
    output: Tensor = _Fetch.apply(weight, ids, valid, _Call(table))
    return output


class _Saving(torch.autograd.Function):
    """Keeps the ids, so that autograd raises if they are changed before the backward."""

    def __init_subclass__(cls) -> None:
        # torch asks for it in every call, and to find it takes longer than a small lookup.
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ids, valid, ctx.call = inputs
        ctx.save_for_backward(ids, valid)
        ctx.save_for_forward(ids, valid)


class _Fetch(_Saving):
    """Rows for ids. Its backward sums gradients per id: each is the transpose of the other."""

    @staticmethod
    def forward(weight: Tensor, ids: Tensor, valid: Tensor | None, call: _Call) -> Tensor:
        call.table.compare(ids, valid)  # Before any rank looks at its own.
        return call.request(ids, valid).rows(local(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.call.table.sparse and torch.is_grad_enabled():
            raise RuntimeError(
                "`sparse` must be False for derivatives of a gradient (`create_graph=True`) and "
                "for `torch.func`, but is True instead. Make the table with `sparse=False`."
            )
        return _SumById.apply(grad, *ctx.saved_tensors, ctx.call), None, None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, *_: Any) -> Tensor:
        ids, valid = ctx.saved_tensors
        return fetch(weight, ids, valid, ctx.call.table)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        weight, ids, valid, call = inputs
        if in_dims[0] is not None:
            return _one_by_one(_Fetch, info, in_dims, inputs)
        if call.table.output == "sequence" and ids.ndim == 1:
            raise _no_sequence()
        # More ids of one table are one lookup.
        ids, valid = _batched(ids, in_dims[1], info), _batched(valid, in_dims[2], info)
        return fetch(weight, ids, valid, call.table), 0


class _SumById(_Saving):
    @staticmethod
    def forward(grad: Tensor, ids: Tensor, valid: Tensor | None, call: _Call) -> Tensor:
        return call.request(ids, valid).gradient(grad, call.table.grad_buffer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        table = ctx.call.table
        ids, valid = ctx.saved_tensors
        return fetch(table.without_pad_row(grad), ids, valid, table), None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Tensor:
        output: Tensor = _SumById.apply(grad, *ctx.saved_tensors, _Call(ctx.call.table))
        return output

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        return _one_by_one(_SumById, info, in_dims, inputs)


def _one_by_one(
    function: type[_Saving], info: Any, in_dims: Any, inputs: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """The function of each item of a batch, as for tables of an ensemble."""
    parts = [_batched(x, dim, info) for x, dim in zip(inputs[:3], in_dims[:3], strict=True)]
    items = zip(*(repeat(None) if part is None else part for part in parts), strict=False)
    return torch.stack([function.apply(*item, _Call(inputs[3].table)) for item in items]), 0


def _batched(x: Any, dim: int | None, info: Any) -> Any:
    """``x`` with a batch in the first dimension; ``None`` stays."""
    if x is None:
        return None
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def _gradient(returned: ReturnedGrads, table: Lookup, into: GradBuffer | None) -> Tensor:
    """The gradient of this rank's block."""
    rows, columns = table.place.rows, returned.columns
    if returned.grad.device.type != "cpu" and not table.sparse and returned.distinct is None:
        grad = returned.grad[:, columns.start : columns.stop]
        return sum_all(grad, rows_to_sum(returned.ids, rows, table.pad_idx), len(rows))
    distinct = returned.distinct or find_distinct(returned.ids, returned.positions)
    if table.place.dim == 0:
        distinct = distinct.within(rows)
    if table.pad_idx is not None:
        distinct = distinct.without(table.pad_idx)
    sums = sum_by_id(returned.grad, distinct, columns)
    used = (distinct.ids - rows.start).long()
    if table.sparse:
        return as_sparse(used, sums, len(rows))
    if into is not None and sums.device.type == "cpu" and not is_batched(sums):
        return into.fill(used, sums, len(rows))
    return sums.new_zeros(len(rows), sums.size(1)).index_copy_(0, used, sums)


def _no_sequence() -> ValueError:
    return ValueError("`x` must have a dimension to cut for the output 'sequence', but has none.")


def _sequence_blocks(ids: Tensor, valid: Tensor | None, gang: Gang) -> list[Tensor]:
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
        blocks.append(block if valid is None else block[valid.flatten()[block]])
    return blocks
