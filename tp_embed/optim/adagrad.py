"""Adagrad with one accumulator per row."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tp_embed.mapped.store import new_zeros
from tp_embed.optim.masters import State
from tp_embed.optim.rows import RowOptimizer


@final
class RowwiseAdagrad(RowOptimizer):
    r"""Adagrad (Duchi et al., 2011) with one accumulator per row, as ``RowWiseAdagrad`` of TorchRec
    and ``EXACT_ROWWISE_ADAGRAD`` of FBGEMM. For a row w of E items with the gradient g:

    .. math::

        s \leftarrow s + \frac{1}{E} \sum_i g_i^2, \qquad
        w \leftarrow w - \frac{lr}{\sqrt{s} + eps}\, g

    State: 4 bytes a row; with weight decay 8 more.

    The arguments are documented in :class:`RowOptimizer`.
    """

    is_row_wise = True
    row_states: ClassVar = {"sum": (), "row_decay": ()}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)

    def _init_state(self, state: State, weight: Tensor, dtype: torch.dtype) -> None:
        state["sum"] = new_zeros(weight, "sum", (len(weight),), dtype)

    def _update(
        self,
        group: dict[str, Any],
        state: State,
        rows: Tensor,
        grad: Tensor,
        square: Tensor | None,
        values: Tensor,
    ) -> None:
        sums = state["sum"].index_select(0, rows).add_(square)
        state["sum"].index_copy_(0, rows, sums)
        rates = sums.sqrt_().add_(group["eps"]).reciprocal_().mul_(float(group["lr"]))
        values.addcmul_(grad, rates[:, None], value=-1.0)
