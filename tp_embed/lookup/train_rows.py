"""Trains only some rows of a table: the option ``train_rows`` of the embeddings.

The gradient of all other rows is zero, as with ``torch.nn.Embedding`` and
``weight.register_hook(lambda grad: grad * mask)``: bit for bit the same, except that NaN and
infinities in rows that don't train become zero too. The mask applies to the gradient of the weight,
including the part from an output head that shares it.

Optimizers keep states for the whole shard, and see zeros in the other rows. These keep their values
unless an optimizer changes weights without a gradient, by weight decay: put the weight into a
parameter group with ``weight_decay=0``. The mask survives copies, pickling, ``to_empty()``, casts,
``load_state_dict(assign=True)`` and another weight. A sparse gradient holds only rows that train;
a dense one is in new memory, even with ``reuse_grad``.

Rows are a slice, a range, integers in any order (negative ones count from the end), or a mask with
a bool for each row of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tp_embed._torch_private import hooks_of
from tp_embed.lookup.gradient import as_sparse

# Rows of a table: indices, or a mask of all rows.
Rows = slice | range | Sequence[int] | Sequence[bool] | Tensor


def read_rows(rows: str | list[int]) -> Rows:
    """Parses rows from a config: a list of rows, or a Python slice such as ``"32000:"``.

    :raises ValueError: ``rows`` is neither.
    """
    if isinstance(rows, list):
        return rows
    try:
        bounds = [int(bound) if bound.strip() else None for bound in rows.split(":")]
    except (AttributeError, ValueError):
        bounds = []
    if len(bounds) not in (2, 3):
        raise ValueError(f"rows must be a list, or a slice such as '32000:', but are {rows!r}")
    return slice(*bounds)


def as_rows(train_rows: Rows, num_embeddings: int) -> Tensor:
    """
    :param train_rows: the rows; see the module.
    :returns: the rows, ascending. *Shape:* :math:`(n)`. *Dtype:* int64.
    :raises TypeError: ``train_rows`` has another type.
    :raises ValueError: ``train_rows`` is not one-dimensional, a mask of another length, or empty.
    :raises IndexError: a row is out of range.
    """
    if isinstance(train_rows, slice):
        train_rows = range(num_embeddings)[train_rows]
    given: Any = list(train_rows) if isinstance(train_rows, range) else train_rows
    try:
        # The default device may be `meta`.
        rows = (
            given.detach().cpu() if isinstance(given, Tensor) else torch.tensor(given, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError):
        rows = None
    if rows is not None and not rows.numel():
        raise ValueError(
            "`train_rows` must name at least one row, but names none. Freeze the whole table with "
            "`weight.requires_grad_(False)`."
        )
    if rows is None or rows.is_floating_point() or rows.is_complex():
        kind = type(train_rows).__name__ if rows is None else rows.dtype
        raise TypeError(
            "`train_rows` must be a slice, a range, integers, or a mask of bools, but is a "
            f"`{kind}` instead."
        )
    if rows.dtype == torch.bool:
        if rows.shape != (num_embeddings,):
            raise ValueError(
                f"`train_rows` must have the shape {(num_embeddings,)} (num_embeddings) as a mask "
                f"of bools, but has {tuple(rows.shape)} instead."
            )
        if not rows.any():
            return as_rows([], num_embeddings)
        return rows.nonzero()[:, 0]
    if rows.ndim != 1:
        raise ValueError(
            f"`train_rows` must be one-dimensional, but has the shape {tuple(rows.shape)} instead."
        )
    rows = rows.long()
    wrong = rows[(rows < -num_embeddings) | (rows >= num_embeddings)]
    if len(wrong):
        raise IndexError(
            f"`train_rows` must be in [-{num_embeddings}, {num_embeddings}) (num_embeddings), "
            f"but has {int(wrong[0])}."
        )
    found: Tensor = (rows % num_embeddings).unique()
    return found


class RowMask:
    """A hook that zeroes the gradient of rows that don't train.

    It is registered on the weight, so it sees the sum over all embeddings and heads that share it.

    :param train_rows: the rows of the table that train, ascending.
    :param block: the rows of the table that the weight holds.
    """

    _tp_embed_shardwise = True

    def __init__(self, train_rows: Tensor, block: range) -> None:
        self.train_rows = train_rows
        offsets = train_rows - block.start
        is_own = (offsets >= 0) & (train_rows < block.stop) & (offsets % block.step == 0)
        self._own = offsets[is_own] // block.step

    def __call__(self, grad: Tensor) -> Tensor:
        own = self._own = self._own.to(grad.device)
        if grad.is_sparse:
            grad = grad.coalesce()
            rows = grad.indices()[0]
            kept = torch.isin(rows, own)
            return as_sparse(rows[kept], grad.values()[kept], grad.size(0))
        # Copies instead of multiplying, to drop NaN in the other rows.
        masked: Tensor = grad.new_zeros(grad.shape).index_copy(0, own, grad.index_select(0, own))
        return masked


def mask_gradient(weight: Tensor, train_rows: Tensor, block: range) -> None:
    """Registers a :class:`RowMask` on ``weight``, unless it has one.

    :raises ValueError: ``weight`` has one with other rows.
    """
    if not (weight.requires_grad and weight.is_leaf):
        return
    for hook in hooks_of(weight):
        if isinstance(hook, RowMask):
            if hook.train_rows is train_rows or torch.equal(hook.train_rows, train_rows):
                return
            raise ValueError(
                f"`train_rows` must be the same for all that share a weight, but is "
                f"{_describe(train_rows)} and {_describe(hook.train_rows)}."
            )
    weight.register_hook(RowMask(train_rows, block))


def _describe(rows: Tensor) -> str:
    return f"{len(rows)} rows from {int(rows[0])} to {int(rows[-1])}"
