"""Cross entropy over logits that are sharded over a gang, and fused with the output projection."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from tp_embed._torch_private import is_transformed
from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.blocks import in_graph
from tp_embed.gang.collectives import reduce_partial
from tp_embed.nn.chunks import without_autocast
from tp_embed.nn.fused_loss import FusedHead, FusedLoss
from tp_embed.nn.local_logits import local_values
from tp_embed.nn.projection import product_dtypes
from tp_embed.nn.token_loss import (
    LossOptions,
    check_target,
    composed_losses,
    differentiable_losses,
    scaled,
    widened,
)
from tp_embed.parameter.sharded import unguarded
from tp_embed.partition import Partition

__all__ = ["LossOptions", "Reduction", "cross_entropy", "linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]

_ALONE: Gang = FakeGang("cpu")  # Size 1: sends nothing.


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    gang: Gang,
    partition: Partition,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Computes :func:`torch.nn.functional.cross_entropy` of logits that are sharded along the
    vocabulary, without gathering them. See :class:`LossOptions` for the formula.

    Does two all-reduces, of N and 2 N (with label smoothing 3 N) fp32 numbers, for N tokens; the
    backward sends nothing. If a gradient is needed, saves one fp32 number per logit of this rank,
    and with ``soft_cap`` the logits too. Supports second derivatives, transforms of
    :mod:`torch.func` and graphs, at the cost of more memory and communication.

    :param logits: this rank's shard. *Shape:* :math:`(*,V_{rank})`. Any floating dtype; the loss is
        computed in fp32, or in fp64 for fp64.
    :param target: classes out of all V, the same on every rank. *Shape:* :math:`(*)`.
    :param partition: the partition of V over the gang.
    :param soft_cap: leave it out for logits that are already capped, as by a Gemma model.
    :param reduction: ``"mean"`` over the tokens that are not ignored, ``"sum"``, or ``"none"``.
    :returns: the same on every rank. *Shape:* :math:`()`, or :math:`(*)` for ``"none"``.
    :raises ValueError: shapes do not match, or an option is out of range.
    :raises IndexError: a target is neither a class nor ``ignore_index``. On an accelerator, a
        device-side assertion fails instead, as in torch.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"`reduction` must be 'mean', 'sum' or 'none', but is {reduction!r} instead."
        )
    options = LossOptions(ignore_index, label_smoothing, z_loss, soft_cap)
    flat_target = _check(logits, target, partition, options)
    held = len(partition.shard(gang.rank))
    if logits.size(-1) != held:
        raise ValueError(
            f"`logits` must have the {held} columns of this rank, but has {logits.size(-1)} "
            "instead. For whole logits use `torch.nn.functional.cross_entropy()`."
        )
    logits = local_values(logits).reshape(len(flat_target), held)
    losses = differentiable_losses(logits, flat_target, gang, partition, options)
    if reduction == "none":
        return losses.view(target.shape)
    if reduction == "sum":
        return losses.sum()
    return _mean(losses.sum(), (flat_target != ignore_index).sum())


# The compiler would unroll its loops into hundreds of products.
@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="For a loss in the graph, use `cross_entropy()` with the logits."
)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    gang: Gang,
    partition: Partition,
    *,
    shard_dim: int = 0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    scale: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes the cross entropy of ``linear(x, weight, bias)`` without holding all logits.

    The forward computes the gradients of all inputs that need one and saves them for the backward
    (Liger Kernel; Hsu et al., 2024). The logits of the first E tokens or so are held in the memory
    of the weight's gradient. Those of other tokens are computed for a chunk of tokens at a time, in
    a buffer of at most 2 N E + E² items (or 1 MiB), if the weight's gradient can accumulate over
    chunks: not in bf16, and not if chunks would have under 64 tokens. Else they are computed twice,
    for a block of classes at a time, as in DeepSpeed's `vocab_parallel_linear_cross_entropy`. The
    weight's gradient has the dtype of a bf16 weight if ``shard_dim`` is 0, and else is in fp32
    (fp64); with ``shard_dim`` 1 no logits are computed twice, which would send them twice.

    It also saves the inputs for second derivatives, which hold all logits, as do transforms of
    :mod:`torch.func` and graphs. For ``shard_dim`` 0, does up to one all-gather per chunk, of 3 N
    numbers per rank for all N tokens, or 4 N with label smoothing; for 1, an all-reduce of all N V
    logits in fp32 (fp64 for fp64). For 0 the gradient of ``x`` is partial: pass ``x`` through
    :func:`~tp_embed.gang.collectives.copy_to_gang`, as :class:`~tp_embed.OutputHead` does.

    Logits are fp32 in any dtype of ``x`` and ``weight``, and under autocast, which rounds only
    ``x`` and ``weight``, and only where products run in its dtype: on accelerators, and on CPUs
    that support it. Other devices than CUDA compute logits from blocks of the weight in fp32. The
    CPU skips ignored tokens.

    :param x: the hidden states, *Shape:* :math:`(*,E)`; for ``shard_dim`` 1 this rank's columns,
        *Shape:* :math:`(*,E_{rank})`.
    :param weight: *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param target: classes out of all V, the same on every rank. *Shape:* :math:`(*)`.
    :param partition: the partition of V, or E, over the gang.
    :param bias: *Shape:* :math:`(V_{rank})` or, for ``shard_dim`` 1, :math:`(V)`.
    :param accum_dtype: ``torch.float32`` accumulates the gradient of a bf16 weight in fp32, so
        fewer logits or none are computed twice, for 4 more bytes of memory per item of the weight.
    :returns: the loss, in fp32 (fp64 for fp64), the same on every rank.
    :raises ValueError: shapes do not match, or an option is out of range.
    :raises IndexError: as :func:`cross_entropy`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"`reduction` must be 'mean' or 'sum', but is {reduction!r} instead. For the loss of "
            "each token use `OutputHead.loss(..., reduction='none')`."
        )
    check_accum_dtype(accum_dtype)
    options = LossOptions(ignore_index, label_smoothing, z_loss, soft_cap, scale)
    # With `shard_dim` 1 each rank gets all logits of a chunk, so the loss needs no gang.
    sum_over, loss_gang = (gang, _ALONE) if shard_dim else (_ALONE, gang)
    classes = Partition(weight.size(0), 1) if shard_dim else partition
    widths = partition.sizes if shard_dim else (x.size(-1),)
    flat_target = _check(x, target, classes, options)
    x = x.reshape(len(flat_target), x.size(-1))
    kept = flat_target != ignore_index
    count = kept.sum() if reduction == "mean" else kept.new_ones((), dtype=torch.long)
    if is_transformed() or in_graph(x):
        context = sum_over, loss_gang, classes, options, product_dtypes(x, weight)[1]
        return _mean(_composed_sum(x, weight, bias, flat_target, *context), count)
    if x.device.type == "cpu" and not kept.all():
        index = kept.nonzero()[:, 0]
        x, flat_target = x.index_select(0, index), flat_target[index]
    with unguarded():
        loss: Tensor = _LinearCrossEntropy.apply(
            x,
            weight,
            bias,
            flat_target,
            FusedHead(sum_over, loss_gang, classes, widths, options),
            count,
            accum_dtype,
            torch.is_grad_enabled(),
        )
    return loss


def check_accum_dtype(accum_dtype: torch.dtype | None) -> None:
    """
    :raises ValueError: a gradient can't have ``accum_dtype``.
    """
    if accum_dtype not in (None, torch.float32):
        raise ValueError(
            f"`accum_dtype` must be torch.float32, or None for the dtype of the weight if that is "
            f"bf16, but is {accum_dtype} instead."
        )


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Divides by ``count``; as in torch, the mean over no token is NaN with a zero gradient."""
    nan = total.new_zeros(()).masked_fill(count == 0, torch.nan)
    return total / count.clamp_min(1) + nan


def _check(tokens: Tensor, target: Tensor, classes: Partition, options: LossOptions) -> Tensor:
    """Checks the options and ``target``, and returns ``target`` flattened."""
    if tokens.shape[:-1] != target.shape:
        raise ValueError(
            f"`target` must have the shape {tuple(tokens.shape[:-1])}, one class for each token, "
            f"but has {tuple(target.shape)} instead."
        )
    options.check()
    return check_target(target, options.ignore_index, classes)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        head: FusedHead,
        count: Tensor,
        accum_dtype: torch.dtype | None,
        with_gradients: bool,
    ) -> Tensor:
        x_needs, weight_needs, bias_needs = (
            with_gradients and needed for needed in ctx.needs_input_grad[:3]
        )
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        _, dtype = product_dtypes(x, weight)
        ctx.context = head.sum_over, head.gang, head.classes, head.options, dtype
        # fp16 can't hold small gradients that are not yet multiplied by the loss scale, so the
        # backward divides them.
        ctx.is_mean = dtype != torch.float16
        divisor = count.clamp_min(1) if ctx.is_mean else torch.ones_like(count)
        fused = FusedLoss(head, x, weight, bias, target, divisor)
        needs = x_needs, weight_needs, bias_needs
        with without_autocast(x):
            total, *gradients = fused.compute(needs, accum_dtype or weight.dtype)
        if any(needs):
            ctx.save_for_backward(*gradients, x, weight, bias, target, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, target, count = ctx.saved_tensors
        gradients, (x, weight, bias) = saved[:3], saved[3:]
        if not torch.is_grad_enabled():
            factor = grad if ctx.is_mean else grad / count.clamp_min(1)
            grads = [
                None if gradient is None else scaled(gradient, factor, dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ]
            return *grads, *[None] * 5
        # `create_graph=True`: the gradient must be differentiable.
        with unguarded():
            # Views, since `x` may depend on `weight`: part of its gradient would count twice.
            x, weight = x.view_as(x), weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
        pairs = zip((x, weight, bias), gradients, strict=True)
        inputs = [tensor for tensor, gradient in pairs if tensor is not None is not gradient]
        loss = _composed_sum(x, weight, bias, target, *ctx.context) / count.clamp_min(1)
        found = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
        return *(None if g is None else next(found) for g in gradients), *[None] * 5


def _composed_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    sum_over: Gang,
    gang: Gang,
    classes: Partition,
    options: LossOptions,
    dtype: torch.dtype,
) -> Tensor:
    """Computes the sum of the losses with differentiable operations, holding all logits."""
    with without_autocast(x), unguarded():
        logits = linear(widened(x.to(dtype)), widened(weight.to(dtype)))
        logits = reduce_partial(logits, sum_over)
        if bias is not None:
            logits = logits + bias
        return composed_losses(logits, target, gang, classes, options).sum()
