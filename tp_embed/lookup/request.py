"""Looks up a batch in a table that is sharded over a gang, with autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from tp_embed._torch_private import unsafe_view
from tp_embed.batch_layout import BatchLayout
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
    no_sequence,
    sequence_blocks,
)
from tp_embed.lookup.gradient import (
    GradBuffer,
    as_sparse,
    check_ddp,
    keep_coalesced,
    rows_to_sum,
    sum_all,
    sum_by_id,
)
from tp_embed.lookup.ids import IdCheck, as_indices
from tp_embed.lookup.options import LookupOptions
from tp_embed.lookup.own_ids import OwnIds, RowsToOwn
from tp_embed.lookup.same_ids import SameIds, check_interval
from tp_embed.mapped.store import select_rows
from tp_embed.parameter.sharded import check_block, local, unguarded
from tp_embed.partition import Partition

_EXCHANGES: dict[tuple[int, bool], Callable[..., Exchange]] = {
    (0, False): RowsToAll,
    (0, True): RowsToBlocks,
    (1, False): ColumnsToAll,
    (1, True): ColumnsToBlocks,
}


class Lookup:
    """Performs the lookups of one table: holds its place, its options, and state between steps.

    A graph of torch.compile refers to it by its ``handle``; see :mod:`tp_embed.gang.graph_ops`.

    :param pad_idx: the row that gets no gradient.
    :param name: the name of the table in errors, the same on every rank.
    """

    def __init__(
        self, place: Place, pad_idx: int | None, options: LookupOptions, name: str
    ) -> None:
        self.place, self.name = place, name
        self.pad_position = None if pad_idx is None else place.position(pad_idx)
        self.output, self.dedup, self.sparse = options.output, options.dedup, options.sparse
        self.staging = Staging()
        self.grad_buffer = GradBuffer() if options.reuse_grad else None
        self.id_check = IdCheck()
        is_own = options.output == "own" and place.gang.size > 1
        self.same_ids = SameIds(0 if is_own else check_interval(options.check_ids))
        self.own_ids = OwnIds(name) if is_own else None
        self.mean = options.grad_reduction == "mean"
        self.handle = register(self)

    def compare(self, ids: Tensor, valid: Tensor | None) -> None:
        """Raises on all ranks if their ids differ. Call it before a rank checks its own ids."""
        self.same_ids(ids, valid, self.place.gang, self.name)

    def flush(self) -> None:
        """Waits until the ids of all lookups so far are checked."""
        self.same_ids.flush()
        self.id_check.flush()

    def rows_in_graph(self, weight: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
        """Runs the forward in a graph."""
        self.compare(ids, valid)
        return Request(ids, valid, self).rows(local(weight))

    def gradient_in_graph(self, grad: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
        """Runs the backward in a graph. Returns new memory, since a graph may write to gradients
        without bumping their version counters."""
        return Request(ids, valid, self).gradient(grad, into=None)

    def transposed(self, block: Tensor) -> Tensor:
        """Returns the weight whose lookup gives the derivative of a gradient: ``block``, divided as
        the gradient is, with zeros in the pad row, which gets no gradient."""
        if self.mean:
            block = block / self.place.gang.size
        if self.pad_position is None or self.pad_position not in self.place.rows:
            return block
        row = self.pad_position - self.place.rows.start
        # Made on the device: copying an index from the host would synchronize with CUDA.
        return block.index_fill(0, torch.arange(row, row + 1, device=block.device), 0)

    def output_shape(self, ids: Tensor) -> list[int]:
        """Returns the shape of the output. Sizes of ``ids`` may be symbolic, which ``range``
        doesn't take."""
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
    """Looks up the rows of the table this rank needs, with gradients of any order.

    :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param x: rows of the whole table, the same on every rank. *Shape:* any. *Dtype:* any integer.
    :param layout: the layout of ``x``. Padded positions return zeros, get no gradient, and are not
        range-checked.
    :returns: *Shape:* :math:`(*,E)`, or the shape given by the output option.
    :raises TypeError: ``x`` does not have an integer dtype.
    :raises ValueError: ``layout`` or ``weight`` has another shape.
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
    """Returns a mask that is false at padding, or ``None`` without padding. *Shape:* as ``ids``.
    *Dtype:* bool."""
    positions = layout.position_indices
    if positions.shape != ids.shape:
        raise ValueError(
            f"`layout` must have the shape of `x`, {tuple(ids.shape)}, but has "
            f"{tuple(positions.shape)} instead. Make it with `BatchLayout.of(x, ...)`."
        )
    return positions.to(ids.device) >= 0 if layout.padded else None


def _with_gradient(table: Lookup, weight: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
    check_ddp(weight, is_sparse=table.sparse, has_own_ids=table.own_ids is not None)
    if table.sparse:
        keep_coalesced(weight)
    return fetch(weight, ids, valid, table)


_outside_of_graph = torch.compiler.disable(
    _with_gradient, reason="A graph has no sparse gradients: pass `sparse=False`."
)


class Request:
    """One lookup of a batch, in two steps without autograd.

    :param ids: rows of the whole table, the same on every rank unless the table is for ids of each
        rank. *Shape:* any. *Dtype:* int32, int64.
    :param valid: false at padding; ``None`` for no padding. *Shape:* as ``ids``. *Dtype:* bool.
    :raises IndexError: an id is out of range.
    """

    def __init__(self, ids: Tensor, valid: Tensor | None, table: Lookup) -> None:
        place, shape = table.place, ids.shape
        own_ids = None if ids.is_meta else table.own_ids
        self._table = table
        self._exchange: Exchange | _OwnBlock
        if own_ids is not None:
            options = table.dedup, table.staging, own_ids, table.mean
            self._exchange = RowsToOwn(place, ids, valid, *options)
        else:
            self._exchange, shape, valid = _same_on_all_ranks(ids, valid, table)
        self._shape = shape
        self._kept = None if valid is None else valid.flatten().nonzero()[:, 0]

    def rows(self, weight: Tensor) -> Tensor:
        """Returns the rows of the table this rank needs, in new memory, not as a view.

        :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
        :returns: *Shape:* :math:`(*,E)`, or the shape given by the output option.
        :raises ValueError: ``weight`` has another size.
        """
        place = self._table.place
        check_block(weight, place.gang, place.partition, place.dim)
        rows = self._exchange.fetch(weight)
        if self._kept is not None:
            padded = rows.new_zeros(self._shape.numel(), rows.size(1))
            rows = padded.index_copy_(0, self._kept, rows)
        # Autograd refuses in-place writes to a view that an autograd function returned.
        output: Tensor = unsafe_view(rows, [*self._shape, rows.size(1)])
        return output

    def gradient(self, grad: Tensor, into: GradBuffer | None) -> Tensor:
        """Computes the gradient of this rank's block from the gradient of :meth:`rows`.

        :param into: the buffer for a dense gradient; if ``None``, allocates new memory.
        """
        if isinstance(self._exchange, (RowsToBlocks, ColumnsToBlocks, RowsToOwn)):
            check_sendable(grad)
        grad = grad.reshape(self._shape.numel(), grad.size(-1))
        if self._kept is not None:
            grad = grad[self._kept]
        return _gradient(self._exchange.backward(grad), self._table, into)


def _same_on_all_ranks(
    ids: Tensor, valid: Tensor | None, table: Lookup
) -> tuple[Exchange | _OwnBlock, torch.Size, Tensor | None]:
    """Returns the exchange for ids that all ranks have, and the shape and the valid positions of
    what this rank gets."""
    place, gang, shape, blocks = table.place, table.place.gang, ids.shape, None
    table.id_check(ids, place.num_rows, gang)
    if ids.device.type != "cpu":  # Errors for ids out of range are raised later.
        ids = ids.clamp(0, place.num_rows - 1)
    if table.output == "sequence" and gang.size > 1:
        blocks = sequence_blocks(ids, valid, gang)
        own = Partition(shape[-1], gang.size).shard(gang.rank)
        shape = torch.Size((*shape[:-1], len(own)))
        valid = None if valid is None else valid[..., own.start : own.stop]
    elif valid is not None:
        ids = ids[valid]
    ids = ids.flatten()
    if gang.size == 1 or table.output in ("shard", "own"):
        return _OwnBlock(ids), shape, valid
    kind = _EXCHANGES[place.dim, blocks is not None]
    return kind(place, ids, blocks, table.dedup, table.staging), shape, valid


class _OwnBlock:
    """Replaces an exchange if a rank needs only rows it holds: of the whole table, or of its own
    columns."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def fetch(self, weight: Tensor) -> Tensor:
        return select_rows(weight, self._ids)

    def backward(self, grad: Tensor) -> ReturnedGrads:
        return ReturnedGrads(grad, self._ids, None, range(grad.size(1)))


class _Call:
    """A lookup for autograd. Keeps its request from the forward to the last backward."""

    def __init__(self, table: Lookup) -> None:
        self.table = table
        self._request: Request | None = None
        self._ids: TensorWeakRef | None = None

    def request(self, ids: Tensor, valid: Tensor | None) -> Request:
        """Returns the request for ``ids``, a new one if a saved-tensor hook replaced them."""
        request = self._request
        # An address doesn't tell: new ids can get the memory of those that were freed.
        if request is None or self._ids is None or self._ids() is not ids:
            request, self._ids = Request(ids, valid, self.table), TensorWeakRef(ids)
        self._request = request if is_needed_again() else None
        return request


def fetch(weight: Tensor, ids: Tensor, valid: Tensor | None, table: Lookup) -> Tensor:
    """Looks up the rows of the table this rank needs, with gradients of any order.

    :param weight: this rank's block. *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param ids: as for :class:`Request`; ``valid`` likewise.
    """
    output: Tensor = _Fetch.apply(weight, ids, valid, _Call(table))
    return output


class _Saving(torch.autograd.Function):
    """Saves the ids, so that autograd raises if they are modified before the backward."""

    def __init_subclass__(cls) -> None:
        # torch inspects the signature in every call, which takes longer than a small lookup.
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ids, valid, ctx.call = inputs
        ctx.save_for_backward(ids, valid)
        ctx.save_for_forward(ids, valid)


class _Fetch(_Saving):
    """Fetches rows for ids. Its backward, :class:`_SumById`, is its transpose and vice versa."""

    @staticmethod
    def forward(weight: Tensor, ids: Tensor, valid: Tensor | None, call: _Call) -> Tensor:
        call.table.compare(ids, valid)  # Before a rank checks its own ids.
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
            raise no_sequence()
        # Batched ids of one table are one lookup.
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
        return fetch(table.transposed(grad), ids, valid, table), None, None, None

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
    """Applies ``function`` to each item of a batch, for example to the tables of an ensemble."""
    parts = [_batched(x, dim, info) for x, dim in zip(inputs[:3], in_dims[:3], strict=True)]
    items = zip(*(repeat(None) if part is None else part for part in parts), strict=False)
    return torch.stack([function.apply(*item, _Call(inputs[3].table)) for item in items]), 0


def _batched(x: Any, dim: int | None, info: Any) -> Any:
    """Moves the batch to the first dimension of ``x``, or expands it; keeps ``None``."""
    if x is None:
        return None
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def _gradient(returned: ReturnedGrads, table: Lookup, into: GradBuffer | None) -> Tensor:
    """Sums the returned gradients into the gradient of this rank's block."""
    rows, columns = table.place.rows, returned.columns
    if returned.grad.device.type != "cpu" and not table.sparse and returned.distinct is None:
        grad = returned.grad[:, columns.start : columns.stop]
        return sum_all(grad, rows_to_sum(returned.ids, rows, table.pad_position), len(rows))
    distinct = returned.distinct or find_distinct(returned.ids, returned.positions)
    if table.place.dim == 0:
        distinct = distinct.within(rows)
    if table.pad_position is not None:
        distinct = distinct.without(table.pad_position)
    sums = sum_by_id(returned.grad, distinct, columns)
    used = (distinct.ids - rows.start).long()
    if table.sparse:
        return as_sparse(used, sums, len(rows))
    if into is not None and sums.device.type == "cpu" and not is_batched(sums):
        return into.fill(used, sums, len(rows))
    return sums.new_zeros(len(rows), sums.size(1)).index_copy_(0, used, sums)
