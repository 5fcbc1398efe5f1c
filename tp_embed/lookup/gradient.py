"""Sums output gradients per id.

Rows are summed in the order of their positions, as :class:`torch.nn.Embedding` does on the CPU, so
that the sums are bit for bit the same however a table is sharded; bf16 and fp16 are summed in fp32.
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

# For up to this many ids, CUDA's kernel accumulates in the dtype of the gradient, 32 ids at a time.
_ROUNDED_OFTEN = 3072


def sum_by_id(grad: Tensor, distinct: Distinct, columns: range) -> Tensor:
    """Sums the rows of ``grad`` per id, in the order of ``distinct``.

    :param grad: *Shape:* :math:`(N,E)`.
    :param distinct: the distinct values of the N ids, or of some of them.
    :param columns: the columns to sum: a block of the partition of E.
    :returns: *Shape:* :math:`(U,columns)`, in the dtype of ``grad``.
    """
    width, dim = len(columns), grad.size(1)
    if not len(distinct.ids) or not width:
        return grad.new_zeros(len(distinct.ids), width)
    order = distinct.order
    if grad.is_contiguous() and dim % width == 0 and columns.start % width == 0:
        # View `grad` as a narrower matrix, where the block is every `count`-th row: no copy.
        count = dim // width
        order = order if count == 1 else order * count + columns.start // width
    else:
        grad = grad[:, columns.start : columns.stop].contiguous()
    if grad.stride() != (width, 1):  # With other strides torch sums bf16 in bf16.
        grad = grad.view(-1).view(-1, width)
    return embedding_bag(order, grad, distinct.starts, mode="sum")


def rows_to_sum(ids: Tensor, rows: range, pad: int | None) -> Tensor:
    """Returns the row of a block for each id, or ``len(rows)`` for ids that get no gradient here,
    as :func:`sum_all` takes them. *Shape:* :math:`(N)`."""
    local = ids - rows.start
    unused = (local < 0) | (local >= len(rows))
    if pad is not None:
        unused |= ids == pad
    return local.masked_fill(unused, len(rows))


def sum_all(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Computes the gradient of a whole block on an accelerator without synchronizing.

    Allocates one more row than it returns: CUDA's kernel counts the distinct ``rows``, ``num_rows``
    included, and has room for as many as the output has rows.

    :param grad: *Shape:* :math:`(N,E)`.
    :param rows: the row of the block for each row of ``grad``, or ``num_rows`` to ignore it.
        *Shape:* :math:`(N)`. *Dtype:* int32 or int64.
    :returns: *Shape:* :math:`(num\\_rows,E)`.
    """
    if not num_rows or not grad.numel():
        return grad.new_zeros(num_rows, grad.size(1))  # CUDA launches no empty grid.
    if len(rows) <= _ROUNDED_OFTEN and grad.dtype.itemsize < 4:
        sums = _sum_few(grad, rows, num_rows)
    else:
        sums = _embedding_backward(grad, rows, num_rows + 1, num_rows, False)
    return sums[:num_rows].detach()  # Autograd refuses in-place writes to views.


def _sum_few(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """:func:`sum_all` in fp32, including the extra row: sums the rows that occur, and then scatters
    the sums."""
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
    """Returns a coalesced sparse gradient; see :func:`keep_coalesced`."""
    return torch.sparse_coo_tensor(
        rows[None],
        sums,
        (num_rows, sums.size(1)),
        is_coalesced=True,
        check_invariants=False,  # The rows are ascending.
    )


def check_ddp(weight: Tensor, *, is_sparse: bool, has_own_ids: bool) -> None:
    """
    :param has_own_ids: whether each rank looks up ids of its own.
    :raises ValueError: ``DistributedDataParallel`` would treat the sparse gradient of ``weight`` as
        dense, or average the gradients of different shards.
    """
    if not ((is_sparse or has_own_ids) and torch.is_grad_enabled() and is_exchanged_by_ddp(weight)):
        return
    if has_own_ids:
        raise ValueError(
            "`DistributedDataParallel` must not average the weight of a table whose ranks have ids "
            "of their own and hold different rows, but would, and has overwritten the rows with "
            "those of the first rank. Build the model again, and call `DistributedDataParallel."
            "_set_params_and_buffers_to_ignore_for_model(model, [name_of_the_weight])` before it "
            "is wrapped."
        )
    raise ValueError(
        "`sparse` must be False for a table behind `DistributedDataParallel`, which knows sparse "
        "gradients of `torch.nn.Embedding` only, but is True instead. Pass `sparse=False` to "
        "`shard_embeddings()` or to the class, or train with DeepSpeed at ZeRO 0, which exchanges "
        "sparse gradients."
    )


def keep_coalesced(weight: Tensor) -> None:
    """Keeps ``weight.grad`` coalesced, as sparse optimizers expect: autograd drops the flag when it
    accumulates the first gradient."""
    if (
        weight.is_leaf
        and weight.requires_grad
        and not any(map(keeps_coalesced, post_accumulate_hooks_of(weight)))
    ):
        weight.register_post_accumulate_grad_hook(_mark_coalesced)


def keeps_coalesced(hook: object) -> bool:
    """Returns whether ``hook`` was registered by :func:`keep_coalesced`."""
    return hook is _mark_coalesced


def _mark_coalesced(weight: Tensor) -> None:
    grad = weight.grad
    if grad is not None and grad.is_sparse and not grad.is_coalesced():
        mark_coalesced(grad)


class GradBuffer:
    """Reuses memory for the dense gradients of a block. Clears only the rows the previous gradient
    used.

    The buffer is reused only if nothing else references it, and cleared entirely if its version
    counter shows that something wrote to it since. torch doesn't count writes through ``.data`` and
    by collectives of torch.distributed.

    For the CPU only. On an accelerator, another stream may still read a gradient that nothing
    references any more. Only the allocator knows, which waits for the streams memory was recorded
    on; and a graph owns the memory allocated during its capture.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._rows: Tensor | None = None
        self._version = 0
        self._lock = Lock()  # If two threads call `fill()`, one gets new memory.

    def fill(self, rows: Tensor, sums: Tensor, num_rows: int) -> Tensor:
        """Returns a gradient with ``sums`` in ``rows`` and zeros elsewhere."""
        shape = num_rows, sums.size(1)
        with self._lock:
            buffer = self._take(shape, sums)
            buffer.index_copy_(0, rows, sums)
            self._rows, self._version = rows, version(buffer)
            return buffer.detach()  # A new tensor, which autograd can own alone.

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
