"""The lookup of ids in one block of a table, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lookup(
    weight: Tensor,
    ids: Tensor,
    first_row: int,
    num_embeddings: int,
    *,
    pad_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """The rows of a block of a table, with -0.0 in the place of rows that the block doesn't hold.

    -0.0 is what leaves every float, 0.0 and -0.0 included, as it is when added, so that the sum
    over the blocks of a table is the table's row bit for bit.

    The gradient adds up the rows of each id in the order of their positions, as
    :class:`torch.nn.Embedding` does on the CPU; bf16 and fp16 are added up in fp32. With
    ``sparse`` its work and memory grow with the ids and not with the block.

    :param weight: the block. *Shape:* :math:`(V_{block},E)`.
    :param ids: rows of the whole table, all in range. *Shape:* :math:`(*)`. *Dtype:* int32, int64.
    :param first_row: the row of the table that is the block's first.
    :param num_embeddings: V, the number of rows of the whole table.
    :param pad_idx: the row of the table that gets no gradient.
    :param sparse: whether the gradient is a coalesced sparse tensor of the rows that were used;
        see :func:`keep_coalesced`.
    :returns: *Shape:* :math:`(*,E)`. *Dtype:* that of ``weight``.
    """
    output: Tensor = _Lookup.apply(weight, ids, first_row, num_embeddings, pad_idx, sparse)
    return output


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        first_row: int,
        num_embeddings: int,
        pad_idx: int | None,
        sparse: bool,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.first_row, ctx.pad_idx, ctx.sparse = weight.shape, first_row, pad_idx, sparse
        num_rows, dim = weight.shape
        # Not a view, so that the sum over the gang may overwrite it.
        output = weight.new_empty((*ids.shape, dim))
        if not num_rows:
            return output.fill_(-0.0)
        local = ids.flatten() - first_row
        # Out-of-range ids get this far on an accelerator, where their error is a step late.
        if num_rows < num_embeddings or ids.device.type != "cpu":
            rows = local.clamp(0, num_rows - 1)
        else:
            rows = local
        flat = output.view(len(local), dim)
        torch.index_select(weight, 0, rows, out=flat)
        if num_rows < num_embeddings:
            flat.masked_fill_((local != rows)[:, None], -0.0)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        num_rows, dim = ctx.shape
        grad = grad.reshape(ids.numel(), dim)
        ids = ids.flatten()
        local = ids - ctx.first_row
        unused = (local < 0) | (local >= num_rows)
        if ctx.pad_idx is not None:
            unused |= ids == ctx.pad_idx
        local = local.masked_fill(unused, -1)
        dense = _dense_gradient if not ctx.sparse else _sparse_gradient
        return dense(grad, local, num_rows), None, None, None, None, None


def _sum_rows(grad: Tensor, local: Tensor, num_rows: int) -> Tensor:
    """Adds row i of ``grad`` to row ``local[i]`` of zeros, in order, where that is not -1."""
    if not grad.size(1):
        return grad.new_zeros(num_rows, 0)  # The CUDA kernel looks at the strides.
    sums: Tensor = torch.ops.aten.embedding_dense_backward(grad, local, num_rows, -1, False)
    return sums


def _sum_unique_rows(grad: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows in ``local``, -1 left out, in ascending order, and the sum for each."""
    used = local >= 0
    rows, inverse = local[used].unique(return_inverse=True)
    low_precision = grad.dtype in (torch.bfloat16, torch.float16)
    sums = _sum_rows((grad.float() if low_precision else grad)[used], inverse, len(rows))
    return rows, sums.to(grad.dtype)


def _dense_gradient(grad: Tensor, local: Tensor, num_rows: int) -> Tensor:
    # On the CPU torch adds up low precisions in low precision; accelerators use fp32 by themselves.
    if grad.device.type == "cpu" and grad.dtype in (torch.bfloat16, torch.float16):
        rows, sums = _sum_unique_rows(grad, local)
        return grad.new_zeros(num_rows, grad.size(1)).index_copy_(0, rows, sums)
    return _sum_rows(grad, local, num_rows)


def _sparse_gradient(grad: Tensor, local: Tensor, num_rows: int) -> Tensor:
    rows, sums = _sum_unique_rows(grad, local)
    return torch.sparse_coo_tensor(
        rows[None].long(),
        sums,
        (num_rows, grad.size(1)),
        is_coalesced=True,
        check_invariants=False,  # `unique` gives them.
    )


def keep_coalesced(weight: Tensor) -> None:
    """Sees to it that the sparse gradients of :func:`lookup` are coalesced in ``weight.grad`` too,
    as the optimizers want them: where autograd takes over the first one, it loses the mark."""
    hooks = weight._post_accumulate_grad_hooks or {}
    if weight.requires_grad and _mark_coalesced not in hooks.values():
        weight.register_post_accumulate_grad_hook(_mark_coalesced)


def _mark_coalesced(weight: Tensor) -> None:
    grad = weight.grad
    if grad is not None and grad.is_sparse and not grad.is_coalesced():
        rows = grad._indices()[0]
        if (rows[1:] > rows[:-1]).all():
            grad._coalesced_(True)
