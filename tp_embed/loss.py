"""Cross entropy over logits that are cut over a gang, and fused with the projection to them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tp_embed.gang import FakeGang, Gang, ReduceOperation
from tp_embed.ids import as_indices
from tp_embed.partition import Partition

Reduction = Literal["mean", "sum", "none"]

# How large the logits of one chunk of tokens may be, in fp32.
_CHUNK_BYTES = 32 << 20


class LossOptions(NamedTuple):
    """What the loss of a token is, with :math:`p` the softmax of its logits :math:`l` over all V
    classes, :math:`t` its target and :math:`Z = \\sum_v e^{l_v}`:

    .. math:: -(1-\\epsilon) \\log p_t - \\frac{\\epsilon}{V} \\sum_v \\log p_v + z \\log^2 Z

    :param ignore_index: the target of tokens that count for nothing.
    :param label_smoothing: :math:`\\epsilon`, as in :func:`torch.nn.functional.cross_entropy`
        (Szegedy et al., 2016).
    :param z_loss: :math:`z`, which keeps :math:`\\log Z` near 0 (PaLM; Chowdhery et al., 2022).
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    gang: Gang,
    partition: Partition,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy` of logits that are cut over the vocabulary, which
    no rank puts together. See :class:`LossOptions` for the formula.

    Two all-reduces of N and of 2 N (with label smoothing 3 N) fp32 numbers, N being the number of
    tokens; the backward sends nothing. An fp32 number for each logit of this rank is kept for it.

    :param logits: this rank's part. *Shape:* :math:`(*,V_{rank})`. Any floating dtype; the loss is
        computed in fp32, or in fp64 for fp64.
    :param target: classes out of all V, the same on every rank. *Shape:* :math:`(*)`.
    :param partition: how V is cut over the gang.
    :param reduction: ``"mean"`` over the tokens that are not ignored, ``"sum"``, or ``"none"``.
    :returns: the same on every rank. *Shape:* :math:`()`, or :math:`(*)` for ``"none"``.
    :raises ValueError: shapes do not match, or an option is out of its range.
    :raises IndexError: a target is neither a class nor ``ignore_index``. On an accelerator that is
        an assertion on the device, as in torch.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss)
    target = _check(logits, target, options, partition, reduction)
    held = len(partition.shard(gang.rank))
    if logits.size(-1) != held:
        raise ValueError(
            f"`logits` must have the {held} columns of this rank, but has {logits.size(-1)} "
            "instead. For whole logits use `torch.nn.functional.cross_entropy()`."
        )
    flat = logits.reshape(len(target), held)
    losses: Tensor = _CrossEntropy.apply(flat, target, gang, partition, options)
    if reduction == "none":
        return losses.view(logits.shape[:-1])
    count = _count(target, options, reduction)
    # As in torch, the mean over no token at all is NaN, and the gradient is zero.
    nan = losses.new_zeros(()).masked_fill(count == 0, torch.nan)
    return losses.sum() / count.clamp_min(1) + nan


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
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The cross entropy of ``linear(x, weight, bias)`` without the logits: they are computed for
    some tokens at a time, as many as take 32 MiB in fp32, together with their gradients; low
    precisions take twice that for a moment.

    The gradients of all inputs are computed in the forward and kept for the backward, that of the
    weight in fp32, so that a chunk of logits is computed once (Liger Kernel; Hsu et al., 2024).
    What is sent depends on ``shard_dim``: for 0, what :func:`cross_entropy` sends; for 1, an
    all-reduce of all N V logits, chunk by chunk. For 0 the gradient of ``x`` is this rank's part:
    pass it through :func:`~tp_embed.collectives.copy_to_gang`, as :class:`~tp_embed.OutputHead`
    does.

    :param x: for ``shard_dim`` 0 the hidden states, *Shape:* :math:`(*,E)`; for 1 this rank's
        columns of them, *Shape:* :math:`(*,E_{rank})`.
    :param weight: *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param target: classes out of all V, the same on every rank. *Shape:* :math:`(*)`.
    :param partition: how V, or E, is cut over the gang.
    :param bias: *Shape:* :math:`(V_{rank})` or, for ``shard_dim`` 1, :math:`(V)`.
    :returns: the loss, in fp32 (fp64 for fp64), the same on every rank.
    :raises ValueError: shapes do not match, or an option is out of its range.
    :raises IndexError: as :func:`cross_entropy`.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss)
    # Over the embedding dimension each rank gets all logits of a chunk, whose loss needs no gang.
    sum_over, loss_gang = (gang, _ALONE) if shard_dim else (_ALONE, gang)
    classes = Partition(weight.size(0), 1) if shard_dim else partition
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"`reduction` must be 'mean' or 'sum', but is {reduction!r} instead. For the loss of "
            "each token use `cross_entropy()` with the logits of this rank."
        )
    target = _check(x, target, options, classes, reduction)
    loss: Tensor = _LinearCrossEntropy.apply(
        x.reshape(len(target), x.size(-1)),
        weight,
        bias,
        target,
        sum_over,
        loss_gang,
        classes,
        _count(target, options, reduction),
        options,
        torch.is_grad_enabled(),
    )
    return loss


_ALONE: Gang = FakeGang("cpu")  # Its size is 1, so nothing ever travels.


def _check(
    tokens: Tensor, target: Tensor, options: LossOptions, classes: Partition, reduction: str
) -> Tensor:
    """``target``, flat and checked against the tokens and the classes."""
    if tokens.shape[:-1] != target.shape:
        raise ValueError(
            f"`target` must have the shape {tuple(tokens.shape[:-1])}, one class for each token, "
            f"but has {tuple(target.shape)} instead."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"`reduction` must be 'mean', 'sum' or 'none', but is {reduction!r} instead."
        )
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(
            f"`label_smoothing` must be in [0, 1], but is {options.label_smoothing} instead."
        )
    if options.z_loss < 0.0:
        raise ValueError(f"`z_loss` must not be negative, but is {options.z_loss} instead.")
    target = as_indices(target).flatten().long()
    bad = (target != options.ignore_index) & ((target < 0) | (target >= classes.size))
    if target.device.type != "cpu":
        torch._assert_async(~bad.any())  # Does not wait for the answer.
    elif bad.any():
        position = int(bad.nonzero()[0])
        raise IndexError(
            f"All of `target` must be in [0, {classes.size}) or {options.ignore_index} "
            f"(ignore_index), but token {position} has {int(target[position])} instead."
        )
    return target


def _count(target: Tensor, options: LossOptions, reduction: str) -> Tensor:
    """By what the sum of the losses is divided."""
    if reduction == "sum":
        return target.new_ones(())
    return (target != options.ignore_index).sum()


def _token_losses(
    logits: Tensor, target: Tensor, gang: Gang, classes: Partition, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and its gradient by the logits.

    :param logits: *Shape:* :math:`(N,V_{rank})`. Overwritten if they are fp32 or fp64.
    :returns: *Shapes:* :math:`(N)`, :math:`(N,V_{rank})`. *Dtype:* fp32, or fp64 for fp64.
    """
    epsilon, own = options.label_smoothing, classes.shard(gang.rank)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    highest = logits.new_full((len(logits),), -torch.inf) if not own else logits.amax(-1)
    if gang.size > 1:
        gang.all_reduce(highest, ReduceOperation.MAX)
    logits.sub_(highest[:, None])

    # The column of each target, and whether it is this rank's; found without asking the device.
    local = target - own.start
    held = (local >= 0) & (local < len(own))
    column = local.clamp(0, max(len(own) - 1, 0))[:, None]
    picked = logits.gather(1, column)[:, 0] if own else logits.new_zeros(len(logits))
    picked = picked.masked_fill(~held, 0.0)  # Another's may be -inf.
    parts = [picked] if not epsilon else [picked, logits.sum(-1)]
    gradient = logits.exp_()
    sums = torch.stack([gradient.sum(-1), *parts])
    if gang.size > 1:
        gang.all_reduce(sums)

    # All logits are less by `highest`, which cancels out but in `log_sum`.
    losses = sums[0].log() - (1 - epsilon) * sums[1]
    if epsilon:
        losses -= epsilon / classes.size * sums[2]
    factor = sums[0].reciprocal()
    if options.z_loss:
        log_sum = sums[0].log() + highest
        losses += options.z_loss * log_sum.square()
        factor *= 1 + 2 * options.z_loss * log_sum
    gradient.mul_(factor[:, None])
    if epsilon:
        gradient.sub_(epsilon / classes.size)
    if own:
        gradient.scatter_add_(1, column, ((epsilon - 1) * held)[:, None].to(gradient.dtype))

    ignored = target == options.ignore_index
    return losses.masked_fill_(ignored, 0.0), gradient.masked_fill_(ignored[:, None], 0.0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        gang: Gang,
        classes: Partition,
        options: LossOptions,
    ) -> Tensor:
        losses, gradient = _token_losses(logits.clone(), target, gang, classes, options)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, grad[:, None], ctx.dtype), None, None, None, None


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
        with_gradients: bool,
    ) -> Tensor:
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        # Gradients of the sum of the losses: what they are scaled with, in fp32, comes later. Over
        # chunks they are added up in fp32; the one of `x` is complete with each chunk.
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        grad_x = torch.empty_like(x) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=sum_dtype) if bias is not None and needs[2] else None
        )

        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        # The largest shard decides, so that all ranks cut alike.
        step = max(1, _CHUNK_BYTES // (4 * classes.block))
        for start in range(0, len(x), step):
            chunk = x[start : start + step]
            logits = linear(chunk, weight)
            if sum_over.size > 1:
                sum_over.all_reduce(logits)
            if bias is not None:
                logits += bias
            dtype = logits.dtype
            losses, gradient = _token_losses(
                logits, target[start : start + step], gang, classes, options
            )
            total += losses.sum()
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            low = gradient.to(dtype)
            if grad_x is not None:
                grad_x[start : start + step] = low @ weight
            if grad_weight is not None and dtype == torch.float16:
                # The sum over a chunk may be more than fp16 holds, which no loss scale would mend.
                grad_weight += gradient.T @ chunk.float()
            elif grad_weight is not None:
                grad_weight += low.T @ chunk
        ctx.save_for_backward(grad_x, grad_weight, grad_bias, count)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, count = ctx.saved_tensors
        factor = grad / count.clamp_min(1)
        grads = [
            None if gradient is None else _scaled(gradient, factor, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor``, rounded to ``dtype`` once: ``factor`` holds the loss scale of fp16,
    and what bf16 would round alike for all gradients."""
    if not factor.ndim:
        factor = factor[None]  # A scalar would be rounded to the dtype of a gradient on CUDA.
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
