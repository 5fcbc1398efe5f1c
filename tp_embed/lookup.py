"""The gradient of a lookup in a block of a table: what was seen at each place of an id, added up.

Rows are added up in the order of their positions, as :class:`torch.nn.Embedding` does on the CPU,
so that the sums are the same bit for bit however a table is cut; bf16 and fp16 are added up in
fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tp_embed.distinct import Distinct


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
    if width == dim:
        pass
    elif grad.is_contiguous() and dim % width == 0 and columns.start % width == 0:
        # The columns of a block are every so many'th row of a narrower matrix: none is copied.
        count = dim // width
        grad, order = grad.view(-1, width), order * count + columns.start // width
    else:
        grad = grad[:, columns.start : columns.stop].contiguous()
    return embedding_bag(order, grad, distinct.starts, mode="sum")


def sum_all(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The gradient of a whole block on an accelerator, without asking it for anything.

    :param grad: *Shape:* :math:`(N,E)`.
    :param rows: the row of the block that each row of ``grad`` belongs to; -1 for none.
        *Shape:* :math:`(N)`.
    """
    if not grad.size(1):
        return grad.new_zeros(num_rows, 0)  # The CUDA kernel looks at the strides.
    sums: Tensor = torch.ops.aten.embedding_dense_backward(grad, rows, num_rows, -1, False)
    return sums


def as_sparse(rows: Tensor, sums: Tensor, num_rows: int) -> Tensor:
    """A coalesced sparse gradient; see :func:`keep_coalesced`."""
    return torch.sparse_coo_tensor(
        rows[None],
        sums,
        (num_rows, sums.size(1)),
        is_coalesced=True,
        check_invariants=False,  # The rows are ascending.
    )


def keep_coalesced(weight: Tensor) -> None:
    """Sees to it that sparse gradients are coalesced in ``weight.grad`` too, as the optimizers want
    them: where autograd takes over the first one, it loses the mark."""
    hooks = weight._post_accumulate_grad_hooks or {}
    if weight.is_leaf and weight.requires_grad and _mark_coalesced not in hooks.values():
        weight.register_post_accumulate_grad_hook(_mark_coalesced)


def _mark_coalesced(weight: Tensor) -> None:
    grad = weight.grad
    if grad is not None and grad.is_sparse and not grad.is_coalesced():
        rows = grad._indices()[0]
        if (rows[1:] > rows[:-1]).all():
            grad._coalesced_(True)


class GradBuffer:
    """Memory for the dense gradients of a block, one after the other. Of the last one only the rows
    that it had are cleared.

    It is taken again when nothing else refers to it, and cleared as a whole if something has
    written to it since, which torch counts. Writes through ``.data``,
    and by collectives of torch.distributed, are not counted.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._rows: Tensor | None = None
        self._version = 0

    def fill(self, rows: Tensor, sums: Tensor, num_rows: int) -> Tensor:
        """A gradient with ``sums`` in ``rows``, and zeros elsewhere."""
        shape = num_rows, sums.size(1)
        buffer = self._take(shape, sums)
        buffer.index_copy_(0, rows, sums)
        self._rows, self._version = rows, buffer._version
        return buffer.detach()  # Of which autograd can be the only owner.

    def _take(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        buffer = self._buffer
        fits = (
            buffer is not None
            and (buffer.shape, buffer.dtype, buffer.device) == (shape, like.dtype, like.device)
            and _is_alone(buffer)
        )
        if buffer is None or not fits:
            buffer = self._buffer = like.new_zeros(shape)
        elif self._rows is None or buffer._version != self._version:
            buffer.zero_()
        else:
            buffer.index_fill_(0, self._rows, 0)
        return buffer

    def __deepcopy__(self, memo: object) -> GradBuffer:
        return GradBuffer()

    def __reduce__(self) -> tuple[type[GradBuffer], tuple[()]]:
        return GradBuffer, ()


def _is_alone(tensor: Tensor) -> bool:
    """Whether no other tensor shares its memory."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count == 2  # The tensor, and the object that was just asked for.
