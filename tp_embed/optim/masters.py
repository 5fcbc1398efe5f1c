"""fp32 values of weights in bf16 and fp16.

A bf16 number is the upper half of an fp32 number. So bf16 weights need only the lower half in
addition: 2 bytes instead of the 4 of a copy. The same split is called parameter remainders in
NVIDIA Apex's ``DistributedFusedAdam``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_embed.mapped.store import new_zeros

State = dict[str, Any]

_HALF = 1 << 16


def prepare(weight: Tensor, state: State) -> None:
    """Adds the fp32 values of a weight in bf16 or fp16 to ``state``, unless it has them."""
    if weight.dtype == torch.float16 and "master" not in state:
        master = new_zeros(weight, "master", weight.shape, torch.float32)
        state["master"] = master.copy_(weight)
    elif weight.dtype == torch.bfloat16 and "remainder" not in state:
        state["remainder"] = new_zeros(weight, "remainder", weight.shape, torch.int16)


def read_rows(weight: Tensor, state: State, rows: Tensor) -> Tensor:
    """Returns a copy of some rows, in fp32 for weights in bf16 and fp16.

    :param state: the optimizer's state of ``weight``; gets what :func:`write_rows` needs.
    """
    prepare(weight, state)
    if weight.dtype == torch.float16:
        master: Tensor = state["master"]
        return master.index_select(0, rows)
    values = weight.index_select(0, rows)
    if weight.dtype != torch.bfloat16:
        return values
    return join(values, state["remainder"].index_select(0, rows))


def write_rows(weight: Tensor, state: State, rows: Tensor, values: Tensor) -> None:
    """Writes rows that :func:`read_rows` has read. The weight is rounded to nearest even, as by
    :meth:`torch.Tensor.bfloat16`."""
    if weight.dtype == torch.float16:
        state["master"].index_copy_(0, rows, values)
    elif weight.dtype == torch.bfloat16:
        state["remainder"].index_copy_(0, rows, _remainder(values))
    weight.index_copy_(0, rows, values.to(weight.dtype))


def read_all(weight: Tensor, state: State) -> Tensor:
    """Returns all rows, in fp32 for weights in bf16 and fp16; may share their memory."""
    if "master" in state:
        master: Tensor = state["master"]
        return master
    if "remainder" in state:
        return join(weight, state["remainder"])
    return weight.float() if weight.dtype.itemsize < 4 else weight


def join(high: Tensor, low: Tensor) -> Tensor:
    """Returns the fp32 values of weights in bf16 and their remainders."""
    return (high.view(torch.int16).int().mul_(_HALF)).add_(low).view(torch.float32)


def _remainder(values: Tensor) -> Tensor:
    """Returns the distance to the nearest bf16 number, in units in the last place of fp32."""
    high = values.bfloat16().view(torch.int16).int().mul_(_HALF)
    # It is 32768 where fp32 is halfway between an even bf16 number and the next: take one less.
    return values.view(torch.int32).sub(high).clamp_(-_HALF // 2, _HALF // 2 - 1).to(torch.int16)
