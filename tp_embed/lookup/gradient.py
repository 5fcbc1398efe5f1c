"""The gradient of a lookup in a block of a table: what was seen at each place of an id, added up.

Rows are added up in the order of their positions, as :class:`torch.nn.Embedding` does on the CPU,
so that the sums are the same bit for bit however a table is cut; bf16 and fp16 are added up in
fp32.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tp_embed._torch_private import (
    is_alone,
    is_exchanged_by_ddp,
    mark_coalesced,
    post_accumulate_hooks_of,
    version,
)
from tp_embed.lookup.distinct import Distinct

_embedding_backward = torch.ops.aten.embedding_dense_backward

# Up to as many ids CUDA's kernel adds to a gradient in its own dtype, 32 ids at a time.
_ROUNDED_OFTEN = 3072


def sum_by_id(grad: Tensor, distinct: Distinct, columns: range) -> Tensor:
    """Adds up the rows of ``grad`` for each id, in the order of ``distinct``.

    :param grad: *Shape:* :math:`(N,E)`.
    :param distinct: of N ids, or some of them.
    :param columns: which of E, as many as the blocks that E is cut into, or the last ones.
    :returns: *Shape:* :math:`(U,columns)`. *Dtype:* that of ``grad``.
    """
    width, dim = len(columns), grad.size(1)
    if not len(distinct.ids) or not width:
        return grad.new_zeros(len(distinct.ids), width)
    order = distinct.order
    if grad.is_contiguous() and dim % width == 0 and columns.start % width == 0:
        # The columns of a block are every so many'th row of a narrower matrix: none is copied.
        count = dim // width
        order = order if count == 1 else order * count + columns.start // width
    else:
        grad = grad[:, columns.start : columns.stop].contiguous()
    if grad.stride() != (width, 1):  # With other strides torch adds bf16 up in bf16.
        grad = grad.view(-1).view(-1, width)
    return embedding_bag(order, grad, distinct.starts, mode="sum")


def rows_to_sum(ids: Tensor, rows: range, pad_idx: int | None) -> Tensor:
    """The row of a block that each id belongs to, or ``len(rows)`` if none, as :func:`sum_all`
    takes them. *Shape:* :math:`(N)`."""
    local = ids - rows.start
    unused = (local < 0) | (local >= len(rows))
    if pad_idx is not None:
        unused |= ids == pad_idx
    return local.masked_fill(unused, len(rows))


def sum_all(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The gradient of a whole block on an accelerator, without asking it for anything.

    It is a part of memory that has one more row: CUDA's kernel counts the distinct ``rows``, and
    has room for as many as there are rows.

    :param grad: *Shape:* :math:`(N,E)`.
    :param rows: the row of the block that each row of ``grad`` belongs to; ``num_rows`` for none.
        *Shape:* :math:`(N)`. *Dtype:* int32 or int64.
    :returns: *Shape:* :math:`(num\\_rows,E)`.
    """
    if not num_rows or not grad.numel():
        return grad.new_zeros(num_rows, grad.size(1))  # CUDA launches no empty grid.
    if len(rows) <= _ROUNDED_OFTEN and grad.dtype.itemsize < 4:
        sums = _sum_few(grad, rows, num_rows)
    else:
        sums = _embedding_backward(grad, rows, num_rows + 1, num_rows, False)
    return sums[:num_rows].detach()  # Views can't be written to in place.


def _sum_few(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """:func:`sum_all` in fp32, before the last row is cut off: the rows that occur are summed, and
    then put into their places."""
    in_order, order = rows.sort(stable=True)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
    segment = is_first.cumsum(0) - 1
    sums = _embedding_backward(grad[order].float(), segment, len(rows), -1, False)
    places = rows.new_full(rows.shape, num_rows, dtype=torch.long)
    places.scatter_(0, segment, in_order.long())
    output = grad.new_zeros(num_rows + 1, grad.size(1))
    return output.index_copy_(0, places, sums.to(grad.dtype))


def as_sparse(rows: Tensor, sums: Tensor, num_rows: int) -> Tensor:
    """A coalesced sparse gradient; see :func:`keep_coalesced`."""
    return torch.sparse_coo_tensor(
        rows[None],
        sums,
        (num_rows, sums.size(1)),
        is_coalesced=True,
        check_invariants=False,  # The rows are ascending.
    )


def check_sparse(weight: Tensor) -> None:
    """
    :raises ValueError: ``DistributedDataParallel`` would take the sparse gradient of ``weight`` for
        a dense one.
    """
    if torch.is_grad_enabled() and is_exchanged_by_ddp(weight):
        raise ValueError(
            "`sparse` must be False for a table behind `DistributedDataParallel`, which knows "
            "sparse gradients of `torch.nn.Embedding` only, but is True instead. Pass "
            "`sparse=False` to `shard_embeddings()` or to the class, or train with DeepSpeed at "
            "ZeRO 0, which exchanges sparse gradients."
        )


def keep_coalesced(weight: Tensor) -> None:
    """Sees to it that sparse gradients are coalesced in ``weight.grad`` too, as the optimizers want
    them: where autograd takes over the first one, it loses the mark."""
    if (
        weight.is_leaf
        and weight.requires_grad
        and not any(map(keeps_coalesced, post_accumulate_hooks_of(weight)))
    ):
        weight.register_post_accumulate_grad_hook(_mark_coalesced)


def keeps_coalesced(hook: object) -> bool:
    """Whether it is that of :func:`keep_coalesced`."""
    return hook is _mark_coalesced


def _mark_coalesced(weight: Tensor) -> None:
    grad = weight.grad
    if grad is not None and grad.is_sparse and not grad.is_coalesced():
        mark_coalesced(grad)


class GradBuffer:
    """Memory for the dense gradients of a block, one after the other. Of the last one only the rows
    that it had are cleared.

    It is taken again when nothing else refers to it, and cleared as a whole if something has
    written to it since, which torch counts. Writes through ``.data``,
    and by collectives of torch.distributed, are not counted.

    It is for the CPU. On an accelerator another stream may still read a gradient that nothing
    refers to any more: that only its allocator knows, which waits for the streams that memory
    was recorded on, and a graph owns the memory that was taken while it was captured.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._rows: Tensor | None = None
        self._version = 0
        self._lock = Lock()  # Of two threads that ask, one gets new memory.

    def fill(self, rows: Tensor, sums: Tensor, num_rows: int) -> Tensor:
        """A gradient with ``sums`` in ``rows``, and zeros elsewhere."""
        shape = num_rows, sums.size(1)
        with self._lock:
            buffer = self._take(shape, sums)
            buffer.index_copy_(0, rows, sums)
            self._rows, self._version = rows, version(buffer)
            return buffer.detach()  # Of which autograd can be the only owner.

    def _take(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        buffer = self._buffer
        fits = (
            buffer is not None
            and (buffer.shape, buffer.dtype, buffer.device) == (shape, like.dtype, like.device)
            and is_alone(buffer)
        )
        if buffer is None or not fits:
            buffer = self._buffer = like.new_zeros(shape)
        elif self._rows is None or version(buffer) != self._version:
            buffer.zero_()
        else:
            buffer.index_fill_(0, self._rows, 0)
        return buffer
