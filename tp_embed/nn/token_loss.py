"""Per-token losses and their gradients, from logits that are sharded over a gang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tp_embed._torch_private import (
    assert_async,
    get_unwrapped,
    is_functorch_wrapped,
    is_transformed,
)
from tp_embed.gang import Gang, ReduceOperation
from tp_embed.gang.blocks import in_graph
from tp_embed.gang.collectives import gather_columns, reduce_partial
from tp_embed.lookup.backward import is_needed_again
from tp_embed.lookup.ids import as_indices
from tp_embed.partition import Partition

# How many items of a gradient the CPU multiplies at once, within its caches.
_SCALED_ITEMS = 1 << 16


class LossOptions(NamedTuple):
    """Options of the loss of a token, with :math:`p` the softmax of its logits :math:`l` over all V
    classes, :math:`t` its target and :math:`Z = \\sum_v e^{l_v}`:

    .. math:: -(1-\\epsilon) \\log p_t - \\frac{\\epsilon}{V} \\sum_v \\log p_v + z \\log^2 Z

    :param ignore_index: the target of tokens to ignore.
    :param label_smoothing: :math:`\\epsilon`, as in :func:`torch.nn.functional.cross_entropy`
        (Szegedy et al., 2016).
    :param z_loss: :math:`z`, which keeps :math:`\\log Z` near 0 (PaLM; Chowdhery et al., 2022).
    :param soft_cap: :math:`c`, which turns :math:`l` into :math:`c \\tanh(l/c)` (Gemma 2; Gemma
        Team, 2024); ``final_logit_softcapping`` in transformers.
    :param scale: multiplies :math:`l`, before the soft cap; ``logit_scale`` in transformers.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None
    scale: float = 1.0

    def check(self) -> None:
        """
        :raises ValueError: an option is out of range.
        """
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(
                f"`label_smoothing` must be in [0, 1], but is {self.label_smoothing} instead."
            )
        if self.z_loss < 0.0:
            raise ValueError(f"`z_loss` must not be negative, but is {self.z_loss} instead.")
        check_soft_cap(self.soft_cap)


def check_soft_cap(soft_cap: float | None) -> None:
    """
    :raises ValueError: ``soft_cap`` is neither ``None`` nor positive.
    """
    if soft_cap is not None and not soft_cap > 0.0:
        raise ValueError(
            f"`soft_cap` must be positive, or None for no cap, but is {soft_cap} instead."
        )


def check_target(target: Tensor, ignore_index: int, classes: Partition) -> Tensor:
    """Returns ``target`` flattened, as int64.

    :raises IndexError: a target is neither a class nor ``ignore_index``. On an accelerator and in
        graphs, a device-side assertion fails instead, as in torch.
    """
    target = as_indices(target).flatten().long()
    values = target
    while not torch.compiler.is_compiling() and is_functorch_wrapped(values):
        values = get_unwrapped(values)  # All samples of a `vmap()`.
    values = values.flatten()
    bad = (values != ignore_index) & ((values < 0) | (values >= classes.size))
    allowed = f"All of `target` must be in [0, {classes.size}) or {ignore_index} (ignore_index)"
    if values.device.type != "cpu" or in_graph(values):
        assert_async(~bad.any(), allowed + ".")  # Doesn't synchronize.
    elif bad.any():
        position = int(bad.nonzero()[0])
        raise IndexError(f"{allowed}, but token {position} has {int(values[position])} instead.")
    return target


def check_reduction(tokens: Sequence[int], target: Tensor, reduction: str) -> None:
    """
    :raises ValueError: ``reduction`` is invalid, or there isn't one target for each token.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"`reduction` must be 'mean', 'sum' or 'none', but is {reduction!r} instead."
        )
    if tuple(tokens) != target.shape:
        raise ValueError(
            f"`target` must have the shape {tuple(tokens)}, one class for each token, but has "
            f"{tuple(target.shape)} instead."
        )


def weights_of_targets(
    target: Tensor, class_weight: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> Tensor:
    """Returns the weight of each target in a mean; zero for ignored ones."""
    kept = target != options.ignore_index
    if class_weight is None:
        return kept.to(dtype)
    return class_weight.to(dtype)[target.long().masked_fill(~kept, 0)] * kept


def differentiable_losses(
    logits: Tensor, target: Tensor, gang: Gang, classes: Partition, options: LossOptions
) -> Tensor:
    """Computes per-token losses with autograd. See :func:`token_losses` for the shapes."""
    if is_transformed() or in_graph(logits):
        return composed_losses(widened(logits), target, gang, classes, options)
    needed = logits.requires_grad and torch.is_grad_enabled()
    anchor = None
    if needed and options.soft_cap is None:
        # Carries second derivatives to the logits, and holds no memory.
        anchor = _StandIn.apply(logits, logits.new_zeros(()).expand_as(logits))
    context = _Context(gang, classes, options, anchor)
    losses: Tensor = _TokenLosses.apply(logits, target, context, needed)
    return losses


class _Context(NamedTuple):
    """Arguments that autograd must not see, so that the graph has only one edge to the logits."""

    gang: Gang
    classes: Partition
    options: LossOptions
    anchor: Tensor | None


class _TokenLosses(torch.autograd.Function):
    """:func:`token_losses` for autograd; saves the gradient. Second derivatives recompute the
    logits from it, so logits are saved only with a soft cap."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, context: _Context, needed: bool
    ) -> Tensor:
        gradient = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        losses, log_sum = token_losses(gradient, target, *context[:3], gradient=needed)
        if needed:
            kept = logits if context.anchor is None else None
            ctx.save_for_backward(gradient, target, log_sum, kept)
            ctx.dtype, ctx.context = logits.dtype, context
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, target, log_sum, logits = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return scaled(gradient, grad[:, None], ctx.dtype), None, None, None
        # `create_graph=True`: the gradient must be differentiable.
        gang, classes, options, anchor = ctx.context
        if logits is None:
            with torch.no_grad():
                values = _logits_of(gradient, log_sum, target, gang, classes, options)
            logits = _StandIn.apply(anchor, values)
        losses = composed_losses(widened(logits), target, gang, classes, options)
        (found,) = torch.autograd.grad(losses, logits, grad, create_graph=True)
        return found.to(ctx.dtype), None, None, None


class _StandIn(torch.autograd.Function):
    """Returns ``values`` and passes their gradient to ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def token_losses(
    logits: Tensor,
    target: Tensor,
    gang: Gang,
    classes: Partition,
    options: LossOptions,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Computes per-token losses and the logsumexp of the logits. Overwrites ``logits``, with the
    gradient of the losses if ``gradient`` is true; a soft cap then also allocates a tensor like
    ``logits``.

    Does two all-reduces, of N and 2 N (with label smoothing 3 N) numbers.

    :param logits: this rank's shard, in any memory layout. *Shape:* :math:`(N,V_{rank})`. *Dtype:*
        fp32 or fp64.
    :param target: *Shape:* :math:`(N)`. *Dtype:* int64.
    :returns: two tensors. *Shape:* :math:`(N)`.
    """
    epsilon, cap, own = options.label_smoothing, options.soft_cap, classes.shard(gang.rank)
    if options.scale != 1.0:
        logits.mul_(options.scale)
    slope = torch.empty_like(logits) if cap is not None and gradient else None
    if cap is not None:
        cap_(logits, cap, slope)

    highest = logits.new_full((len(logits),), -torch.inf) if not own else logits.amax(-1)
    if gang.size > 1:
        gang.all_reduce(highest, ReduceOperation.MAX)
    logits.sub_(highest[:, None])

    column, held = own_targets(target, own)
    picked = logits.gather(1, column)[:, 0] if own else logits.new_zeros(len(logits))
    picked = picked.masked_fill(~held, 0.0)  # Logits of other classes may be -inf.
    parts = [picked] if not epsilon else [picked, logits.sum(-1)]
    logits.exp_()
    sums = torch.stack([logits.sum(-1), *parts])
    if gang.size > 1:
        gang.all_reduce(sums)

    # `highest` was subtracted from all logits; it cancels out except in `log_sum`.
    losses = sums[0].log() - (1 - epsilon) * sums[1]
    if epsilon:
        losses -= epsilon / classes.size * sums[2]
    log_sum = sums[0].log() + highest
    if options.z_loss:
        losses += options.z_loss * log_sum.square()
    ignored = target == options.ignore_index
    losses.masked_fill_(ignored, 0.0)
    if not gradient:
        return losses, log_sum

    factor = sums[0].reciprocal()
    if options.z_loss:
        factor *= 1 + 2 * options.z_loss * log_sum
    logits.mul_(factor[:, None])
    if epsilon:
        logits.sub_(epsilon / classes.size)
    if own:
        logits.scatter_add_(1, column, held[:, None].to(logits.dtype).mul_(epsilon - 1))
    if slope is not None:
        logits.mul_(slope)
    if options.scale != 1.0:
        logits.mul_(options.scale)
    logits.masked_fill_(ignored[:, None], 0.0)
    return losses, log_sum


def cap_(logits: Tensor, cap: float, slope: Tensor | None) -> None:
    """Caps ``logits`` in place, and writes the slope of the cap at each to ``slope``."""
    logits.div_(cap).tanh_()
    if slope is not None:
        torch.addcmul(logits.new_ones(()), logits, logits, value=-1, out=slope)
    logits.mul_(cap)


def composed_losses(
    logits: Tensor, target: Tensor, gang: Gang, classes: Partition, options: LossOptions
) -> Tensor:
    """Computes the losses of :func:`token_losses` with differentiable operations: for derivatives
    of any order, transforms and graphs. Doesn't overwrite ``logits``.

    Does an all-gather of N numbers per rank and an all-reduce of 2 N (with label smoothing 3 N).
    """
    epsilon, cap, own = options.label_smoothing, options.soft_cap, classes.shard(gang.rank)
    if options.scale != 1.0:
        logits = logits * options.scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    fixed = logits.detach()
    highest = fixed.amax(-1) if own else fixed.new_full(fixed.shape[:1], -torch.inf)
    ranks = Partition(gang.size, gang.size)
    highest = gather_columns(highest[:, None], gang, ranks).amax(-1)
    logits = logits - highest[:, None]

    column, held = own_targets(target, own)
    picked = logits.gather(1, column)[:, 0] if own else logits.sum(-1)
    picked = picked.masked_fill(~held, 0.0)
    parts = [picked] if not epsilon else [picked, logits.sum(-1)]
    sums = reduce_partial(torch.stack([logits.exp().sum(-1), *parts]), gang)

    log_sum = sums[0].log()
    losses = log_sum - (1 - epsilon) * sums[1]
    if epsilon:
        losses = losses - epsilon / classes.size * sums[2]
    if options.z_loss:
        losses = losses + options.z_loss * (log_sum + highest).square()
    return losses.masked_fill(target == options.ignore_index, 0.0)


def _logits_of(
    gradient: Tensor,
    log_sum: Tensor,
    target: Tensor,
    gang: Gang,
    classes: Partition,
    options: LossOptions,
) -> Tensor:
    """Recovers the logits that :func:`token_losses` overwrote with ``gradient=True`` and no soft
    cap, as precisely as the gradient holds the probabilities. Logits of ignored tokens are zero.
    """
    epsilon, own = options.label_smoothing, classes.shard(gang.rank)
    column, held = own_targets(target, own)
    weights = gradient + epsilon / classes.size
    if own:
        weights.scatter_add_(1, column, held[:, None].to(weights.dtype).mul_(1 - epsilon))
    weights.div_((1 + 2 * options.z_loss * log_sum)[:, None])
    tiny = torch.finfo(weights.dtype).tiny
    ignored = target == options.ignore_index
    logits = weights.clamp_(min=tiny).log_().add_(log_sum[:, None])
    return logits.masked_fill_(ignored[:, None], 0.0)


def widened(logits: Tensor) -> Tensor:
    """Casts ``logits`` to the dtype of the loss: fp32, or fp64 for fp64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def own_targets(target: Tensor, own: range) -> tuple[Tensor, Tensor]:
    """Returns the column of each target, *Shape:* :math:`(N,1)`, and whether this rank holds it,
    *Shape:* :math:`(N)`, without synchronizing with the device."""
    local = target - own.start
    held = (local >= 0) & (local < len(own))
    return local.clamp(0, max(len(own) - 1, 0))[:, None], held


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``gradient * factor``, rounded to ``dtype`` once. ``factor`` is kept in fp32: it
    holds fp16's loss scale, and rounding it to bf16 would bias all gradients alike.

    Call it in the backward of the function that saved ``gradient``. Overwrites ``gradient`` if the
    dtype is the same and no other backward needs it.
    """
    if not factor.ndim:
        factor = factor[None]  # CUDA would round a 0-d tensor to the dtype of the gradient.
    in_place = gradient.dtype == dtype and not is_needed_again()
    output = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    step = max(1, len(gradient))
    if gradient.device.type == "cpu":  # Casts its operands whole, in memory of their own.
        step = max(1, _SCALED_ITEMS * len(gradient) // max(1, gradient.numel()))
    for start in range(0, len(gradient), step):
        rows = slice(start, start + step)
        part = factor if len(factor) == 1 else factor[rows]
        torch.mul(gradient[rows], part, out=output[rows])
    return output
