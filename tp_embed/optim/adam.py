"""Adam on touched rows, with a second moment for each row or each item."""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tp_embed.mapped.store import new_zeros
from tp_embed.optim.masters import State
from tp_embed.optim.rows import RowOptimizer


class _Adam(RowOptimizer):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"`betas[{i}]` must be in [0, 1), but is {beta} instead.")
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)

    def _init_state(self, state: State, weight: Tensor, dtype: torch.dtype) -> None:
        state["exp_avg"] = new_zeros(weight, "exp_avg", weight.shape, dtype)
        second = (len(weight), 1) if self.is_row_wise else weight.shape
        state["exp_avg_sq"] = new_zeros(weight, "exp_avg_sq", second, dtype)

    def _update(
        self,
        group: dict[str, Any],
        state: State,
        rows: Tensor,
        grad: Tensor,
        square: Tensor | None,
        values: Tensor,
    ) -> None:
        (beta1, beta2), step = group["betas"], state["step"]
        mean = state["exp_avg"].index_select(0, rows).lerp_(grad, 1 - beta1)
        state["exp_avg"].index_copy_(0, rows, mean)
        squares = state["exp_avg_sq"].index_select(0, rows).mul_(beta2)
        if square is None:
            squares.addcmul_(grad, grad, value=1 - beta2)
        else:
            squares.add_(square[:, None], alpha=1 - beta2)
        state["exp_avg_sq"].index_copy_(0, rows, squares)
        # The order of operations of `torch.optim.Adam`.
        denominator = squares.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        values.addcdiv_(mean, denominator, value=-float(group["lr"]) / (1 - beta1**step))


@final
class RowwiseAdam(_Adam):
    r"""Adam (Kingma and Ba, 2015) on touched rows, with one second moment per row, as
    ``PARTIAL_ROWWISE_ADAM`` of FBGEMM. For a row w of E items with the gradient g, in step t:

    .. math::

        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + \frac{1 - \beta_2}{E} \sum_i g_i^2, \qquad
        w \leftarrow w - lr \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + eps}

    Moments of other rows stay as they are, while t counts all steps; see :class:`LazyAdam`.

    State: 4 bytes a parameter and 4 a row; with weight decay 8 more a row. The arguments are
    documented in :class:`RowOptimizer` and :class:`torch.optim.AdamW`.
    """

    is_row_wise = True
    row_states: ClassVar = {"exp_avg_sq": (1,), "row_decay": ()}


@final
class LazyAdam(_Adam):
    """Adam (Kingma and Ba, 2015) on touched rows, with full moments.

    Moments of other rows stay as they are, while bias corrections count all steps, as in
    :class:`torch.optim.SparseAdam`, which adds ``eps`` before the bias correction, keeps states in
    the dtype of the weight and has no weight decay. For rows that each step touches it is
    :class:`torch.optim.AdamW`, bit for bit in fp32 without weight decay.

    State: 8 bytes a parameter; with weight decay 8 more a row. The arguments are documented in
    :class:`RowOptimizer` and :class:`torch.optim.AdamW`.
    """

    is_row_wise = False
