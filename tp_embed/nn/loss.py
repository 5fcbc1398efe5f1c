"""Cross entropy over logits that are sharded over a gang, and fused with the output projection."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.nn.functional import linear

from tp_embed._torch_private import is_transformed
from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.collectives import in_graph, reduce_partial
from tp_embed.nn.projection import add_gradients, compute_logits, product_dtypes, row_blocks
from tp_embed.nn.token_loss import (
    LossOptions,
    check_target,
    composed_losses,
    differentiable_losses,
    scaled,
    token_losses,
    widened,
)
from tp_embed.parameter.sharded import unguarded
from tp_embed.partition import Partition

__all__ = ["LossOptions", "Reduction", "cross_entropy", "linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]

# The minimum size of the logits of one chunk of tokens, in fp32: chunks of fewer tokens multiply
# more slowly (by a half with 32 tokens, by 5% with 128).
_CHUNK_BYTES = 32 << 20

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
    logits = logits.reshape(len(flat_target), held)
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
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Computes the cross entropy of ``linear(x, weight, bias)`` without holding all logits: for a
    chunk of tokens at a time, in one buffer (two with a soft cap) of 32 MiB, or of the size of
    ``x`` in fp32 if larger.

    The forward computes the gradients of all inputs that need one, the weight's in fp32, and saves
    them for the backward, so that each chunk of logits is computed once (Liger Kernel; Hsu et al.,
    2024). It also saves the inputs for second derivatives, which hold all logits, as do transforms
    of :mod:`torch.func` and graphs. For ``shard_dim`` 0, sends as much as :func:`cross_entropy`;
    for 1, an all-reduce of all N V logits in fp32 (fp64 for fp64), chunk by chunk. For 0 the
    gradient of ``x`` is partial: pass ``x`` through
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
    :returns: the loss, in fp32 (fp64 for fp64), the same on every rank.
    :raises ValueError: shapes do not match, or an option is out of range.
    :raises IndexError: as :func:`cross_entropy`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"`reduction` must be 'mean' or 'sum', but is {reduction!r} instead. For the loss of "
            "each token use `cross_entropy()` with the logits of this rank."
        )
    options = LossOptions(ignore_index, label_smoothing, z_loss, soft_cap)
    # With `shard_dim` 1 each rank gets all logits of a chunk, so the loss needs no gang.
    sum_over, loss_gang = (gang, _ALONE) if shard_dim else (_ALONE, gang)
    classes = Partition(weight.size(0), 1) if shard_dim else partition
    width = partition.size if shard_dim else x.size(-1)
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
    # Use the largest shard, so that all ranks get the same chunks.
    most = max(_CHUNK_BYTES // 4, len(x) * width) // classes.block
    with unguarded():
        loss: Tensor = _LinearCrossEntropy.apply(
            x,
            weight,
            bias,
            flat_target,
            sum_over,
            loss_gang,
            classes,
            count,
            options,
            -(-len(x) // max(1, most)),
            torch.is_grad_enabled(),
        )
    return loss


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
        sum_over: Gang,
        gang: Gang,
        classes: Partition,
        count: Tensor,
        options: LossOptions,
        num_chunks: int,
        with_gradients: bool,
    ) -> Tensor:
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        inputs = x, weight, bias, target
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        _, dtype = product_dtypes(x, weight)
        ctx.context = sum_over, gang, classes, options, dtype
        sum_dtype = torch.promote_types(dtype, torch.float32)
        # Gradients of the sum of the losses; the backward scales them in fp32. They accumulate over
        # chunks in fp32, but each chunk completes its rows of `grad_x`.
        grad_x = torch.empty_like(x) if needs[0] else None
        grad_weight = _zeros_like(weight, sum_dtype, needs[1])
        grad_bias = _zeros_like(bias, sum_dtype, needs[2])

        if dtype.itemsize < weight.itemsize:
            weight = weight.to(dtype)  # For autocast; casts to a wider dtype are done per block.
        blocks = row_blocks(weight)
        rows, tokens = len(weight), -(-len(x) // max(1, num_chunks))
        with_slopes = options.soft_cap is not None and any(needs)
        buffers = x.new_empty(1 + with_slopes, tokens * rows, dtype=sum_dtype)
        total = x.new_zeros((), dtype=sum_dtype)
        for start in range(0, len(x), max(1, tokens)):
            chunk = x[start : start + tokens].to(dtype)  # (n, E)
            shape = len(buffers), rows, len(chunk)
            # Classes first, so that products transpose only the tokens, which are fewer.
            logits, *slopes = buffers[:, : rows * len(chunk)].view(shape)  # (V, n)
            compute_logits(logits, chunk, weight, bias, blocks, sum_over)
            losses, _ = token_losses(
                logits.T,
                target[start : start + tokens],
                gang,
                classes,
                options,
                gradient=any(needs),
                scratch=slopes[0].T if slopes else None,
            )
            total += losses.sum()
            if grad_bias is not None:
                grad_bias += logits.sum(1)
            sums = _zeros_like(chunk, sum_dtype, needs[0])
            if needs[0] or needs[1]:
                add_gradients(logits, chunk, weight, blocks, sums, grad_weight)
            if grad_x is not None and sums is not None:
                grad_x[start : start + tokens] = sums
        if any(needs):
            ctx.save_for_backward(grad_x, grad_weight, grad_bias, *inputs, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, target, count = ctx.saved_tensors
        gradients, (x, weight, bias) = saved[:3], saved[3:]
        if not torch.is_grad_enabled():
            factor = grad / count.clamp_min(1)
            grads = [
                None if gradient is None else scaled(gradient, factor, dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ]
            return *grads, *[None] * 8
        # `create_graph=True`: the gradient must be differentiable.
        with unguarded():
            # Views, since `x` may depend on `weight`: part of its gradient would count twice.
            x, weight = x.view_as(x), weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
        pairs = zip((x, weight, bias), gradients, strict=True)
        inputs = [tensor for tensor, gradient in pairs if tensor is not None is not gradient]
        loss = _composed_sum(x, weight, bias, target, *ctx.context) / count.clamp_min(1)
        found = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
        return *(None if g is None else next(found) for g in gradients), *[None] * 8


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
    device = x.device.type
    exact = (
        torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
    )
    with exact, unguarded():
        logits = linear(widened(x.to(dtype)), widened(weight.to(dtype)))
        logits = reduce_partial(logits, sum_over)
        if bias is not None:
            logits = logits + bias
        return composed_losses(logits, target, gang, classes, options).sum()


def _zeros_like(tensor: Tensor | None, dtype: torch.dtype, is_needed: bool) -> Tensor | None:
    return torch.zeros_like(tensor, dtype=dtype) if is_needed and tensor is not None else None
