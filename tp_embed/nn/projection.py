"""Products of hidden states and the weight of an output head, and their gradients, for a chunk of
tokens at a time. Logits are fp32 (fp64 for fp64) whatever the dtype of the products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from tp_embed.gang import Gang

# How much of the weight the CPU multiplies at once, in fp32: about the size of its caches.
_BLOCK_BYTES = 2 << 20

# The same for accelerators: large products, and a small part of the weight in fp32.
_DEVICE_BLOCK_BYTES = 64 << 20

# CPU features that make low-precision products faster than fp32. Without them, they take 4 to 100
# times as long (torch 2.13, AVX2).
_CPU_PRODUCTS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}


def product_dtypes(x: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Returns the dtype that torch gives the logits, and the dtype of the operands of products."""
    device = x.device.type
    logits = torch.promote_types(x.dtype, weight.dtype)
    if (
        is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and logits != torch.float64
    ):
        logits = torch.get_autocast_dtype(device)
    if device != "cpu" or logits not in _CPU_PRODUCTS:
        return logits, logits
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name, False) for name in _CPU_PRODUCTS[logits])
    return logits, logits if fast else torch.float32


def row_blocks(weight: Tensor, width: int | None = None, most: int | None = None) -> list[slice]:
    """Splits the rows of ``weight`` into blocks that a device multiplies at once.

    :param width: the number of columns, if the blocks shall not depend on those of this rank.
    :param most: the largest number of rows of a block.
    """
    size = _BLOCK_BYTES if weight.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    step = size // (4 * max(1, weight.size(1) if width is None else width))
    step = max(1, step if most is None else min(step, most))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def compute_logits(
    out: Tensor,
    chunk: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: list[slice],
    sum_over: Gang,
) -> None:
    """Puts the logits of ``chunk``, *Shape:* :math:`(n,E)`, into ``out``, *Shape:* :math:`(V,n)`.
    Operands are rounded to the dtype of ``chunk``, products to the dtype of ``out``, in which parts
    of ranks are summed.

    :param out: *Dtype:* fp32 or fp64.
    """
    columns = logits_operand(chunk, out.dtype).T
    for block in blocks:
        rows = logits_operand(weight[block].to(chunk.dtype), out.dtype)
        multiply(rows, columns, out[block])
    if sum_over.size > 1:
        partial = out.contiguous()
        sum_over.all_reduce(partial)
        out.copy_(partial)
    if bias is not None:
        out += bias[:, None]


def add_gradients(
    gradient: Tensor,
    chunk: Tensor,
    weight: Tensor,
    blocks: list[slice],
    grad_chunk: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Backpropagates the gradient of the logits, *Shape:* :math:`(V,n)`, and adds it to the
    gradients of ``chunk``, *Shape:* :math:`(n,E)`, and ``weight``, *Shape:* :math:`(V,E)`."""
    for block in blocks:
        low = gradient[block].to(chunk.dtype)
        if grad_chunk is not None:
            multiply(low.T, weight[block].to(chunk.dtype), grad_chunk, add=True)
        if grad_weight is not None and chunk.dtype == torch.float16:
            # The sum over tokens may overflow fp16 at any loss scale.
            multiply(gradient[block], chunk.to(gradient.dtype), grad_weight[block], add=True)
        elif grad_weight is not None:
            multiply(low, chunk, grad_weight[block], add=True)


def logits_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts hidden states or weight to the dtype of the logits, except on CUDA, whose products can
    be wider than their operands."""
    return tensor if tensor.device.type == "cuda" else tensor.to(dtype)


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Writes ``left @ right`` to ``out``, whose dtype may be wider, or adds to it. The products of
    wider dtypes are not rounded to the narrower one on CUDA."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=float(add))  # 0.0 ignores the old values, even NaN.
    elif out.device.type == "cuda" and add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    elif out.device.type == "cuda":
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif add:
        out.add_(left @ right)
    else:
        out.copy_(left @ right)
