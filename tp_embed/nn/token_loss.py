"""The loss of each token, and its gradient, from logits that are cut over a gang."""

from __future__ import annotations

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
from tp_embed.gang.collectives import gather_columns, in_graph, reduce_partial
from tp_embed.lookup.backward import is_needed_again
from tp_embed.lookup.ids import as_indices
from tp_embed.partition import Partition


class LossOptions(NamedTuple):
    """What the loss of a token is, with :math:`p` the softmax of its logits :math:`l` over all V
    classes, :math:`t` its target and :math:`Z = \\sum_v e^{l_v}`:

    .. math:: -(1-\\epsilon) \\log p_t - \\frac{\\epsilon}{V} \\sum_v \\log p_v + z \\log^2 Z

    :param ignore_index: the target of tokens that count for nothing.
    :param label_smoothing: :math:`\\epsilon`, as in :func:`torch.nn.functional.cross_entropy`
        (Szegedy et al., 2016).
    :param z_loss: :math:`z`, which keeps :math:`\\log Z` near 0 (PaLM; Chowdhery et al., 2022).
    :param soft_cap: :math:`c`, with which :math:`c \\tanh(l/c)` takes the place of :math:`l` (Gemma
        2; Gemma Team, 2024): what transformers calls ``final_logit_softcapping``.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None

    def check(self) -> None:
        """
        :raises ValueError: one of them is out of its range.
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
    """``target``, flat and as int64.

    :raises IndexError: a target is neither a class nor ``ignore_index``. On an accelerator that is
        an assertion on the device, as in torch; so it is in a graph.
    """
    target = as_indices(target).flatten().long()
    values = target
    while not torch.compiler.is_compiling() and is_functorch_wrapped(values):
        values = get_unwrapped(values)  # Of all of a batch, by `vmap()`.
    values = values.flatten()
    bad = (values != ignore_index) & ((values < 0) | (values >= classes.size))
    allowed = f"All of `target` must be in [0, {classes.size}) or {ignore_index} (ignore_index)"
    if values.device.type != "cpu" or in_graph(values):
        assert_async(~bad.any(), allowed + ".")  # Does not wait for the answer.
    elif bad.any():
        position = int(bad.nonzero()[0])
        raise IndexError(f"{allowed}, but token {position} has {int(values[position])} instead.")
    return target


def differentiable_losses(
    logits: Tensor, target: Tensor, gang: Gang, classes: Partition, options: LossOptions
) -> Tensor:
    """The loss of each token, for autograd. See :func:`token_losses` for the shapes."""
    if is_transformed() or in_graph(logits):
        return composed_losses(widened(logits), target, gang, classes, options)
    needed = logits.requires_grad and torch.is_grad_enabled()
    anchor = None
    if needed and options.soft_cap is None:
        # Stands for the logits in second derivatives, and holds no memory.
        anchor = _StandIn.apply(logits, logits.new_zeros(()).expand_as(logits))
    how = _How(gang, classes, options, anchor)
    losses: Tensor = _TokenLosses.apply(logits, target, how, needed)
    return losses


class _How(NamedTuple):
    """What is not differentiated, so that the graph has one edge to the logits, not two."""

    gang: Gang
    classes: Partition
    options: LossOptions
    anchor: Tensor | None


class _TokenLosses(torch.autograd.Function):
    """:func:`token_losses`, which leave the gradient. For second derivatives the logits follow from
    it, so they are kept only with a soft cap."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, how: _How, needed: bool) -> Tensor:
        gradient = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        losses, log_sum = token_losses(gradient, target, *how[:3], gradient=needed)
        if needed:
            kept = logits if how.anchor is None else None
            ctx.save_for_backward(gradient, target, log_sum, kept)
            ctx.dtype, ctx.how = logits.dtype, how
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, target, log_sum, logits = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return scaled(gradient, grad[:, None], ctx.dtype), None, None, None
        # Somebody will differentiate it (`create_graph=True`).
        gang, classes, options, anchor = ctx.how
        if logits is None:
            with torch.no_grad():
                values = _logits_of(gradient, log_sum, target, gang, classes, options)
            logits = _StandIn.apply(anchor, values)
        losses = composed_losses(widened(logits), target, gang, classes, options)
        (found,) = torch.autograd.grad(losses, logits, grad, create_graph=True)
        return found.to(ctx.dtype), None, None, None


class _StandIn(torch.autograd.Function):
    """``values`` in the place of ``x``, which gets their gradient."""

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
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and the log of the sum of its exponentials; ``logits`` are
    overwritten, with the gradient of the loss by them if ``gradient`` is true. Then a soft cap
    takes ``scratch``, which is like ``logits``, or else is made.

    Two all-reduces of N and of 2 N (with label smoothing 3 N) numbers.

    :param logits: this rank's part, in any memory layout. *Shape:* :math:`(N,V_{rank})`. *Dtype:*
        fp32 or fp64.
    :param target: *Shape:* :math:`(N)`. *Dtype:* int64.
    :returns: two tensors. *Shape:* :math:`(N)`.
    """
    epsilon, cap, own = options.label_smoothing, options.soft_cap, classes.shard(gang.rank)
    slope: Tensor | None = None  # Of the cap, at each logit.
    if cap is not None:
        logits.div_(cap).tanh_()
        if gradient:
            slope = torch.addcmul(logits.new_ones(()), logits, logits, value=-1, out=scratch)
        logits.mul_(cap)

    highest = logits.new_full((len(logits),), -torch.inf) if not own else logits.amax(-1)
    if gang.size > 1:
        gang.all_reduce(highest, ReduceOperation.MAX)
    logits.sub_(highest[:, None])

    column, held = _own_targets(target, own)
    picked = logits.gather(1, column)[:, 0] if own else logits.new_zeros(len(logits))
    picked = picked.masked_fill(~held, 0.0)  # Another's may be -inf.
    parts = [picked] if not epsilon else [picked, logits.sum(-1)]
    logits.exp_()
    sums = torch.stack([logits.sum(-1), *parts])
    if gang.size > 1:
        gang.all_reduce(sums)

    # All logits are less by `highest`, which cancels out but in `log_sum`.
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
    logits.masked_fill_(ignored[:, None], 0.0)
    return losses, log_sum


def composed_losses(
    logits: Tensor, target: Tensor, gang: Gang, classes: Partition, options: LossOptions
) -> Tensor:
    """The loss of each token as :func:`token_losses` has it, by operations that autograd knows:
    for derivatives of any order, for transforms, and for graphs. ``logits`` are not overwritten.

    An all-gather of N numbers of each rank and an all-reduce of 2 N (with label smoothing 3 N).
    """
    epsilon, cap, own = options.label_smoothing, options.soft_cap, classes.shard(gang.rank)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    fixed = logits.detach()
    highest = fixed.amax(-1) if own else fixed.new_full(fixed.shape[:1], -torch.inf)
    ranks = Partition(gang.size, gang.size)
    highest = gather_columns(highest[:, None], gang, ranks).amax(-1)
    logits = logits - highest[:, None]

    column, held = _own_targets(target, own)
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
    """The logits, from what :func:`token_losses` has made of them with ``gradient=True`` and no
    soft cap. Where the probability of a class has been rounded, so is its logit.

    Those of ignored tokens are zero.
    """
    epsilon, own = options.label_smoothing, classes.shard(gang.rank)
    column, held = _own_targets(target, own)
    weights = gradient + epsilon / classes.size
    if own:
        weights.scatter_add_(1, column, held[:, None].to(weights.dtype).mul_(1 - epsilon))
    weights.div_((1 + 2 * options.z_loss * log_sum)[:, None])
    tiny = torch.finfo(weights.dtype).tiny
    ignored = target == options.ignore_index
    logits = weights.clamp_(min=tiny).log_().add_(log_sum[:, None])
    return logits.masked_fill_(ignored[:, None], 0.0)


def widened(logits: Tensor) -> Tensor:
    """``logits`` in the dtype that losses are computed in: fp32, or fp64 for fp64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _own_targets(target: Tensor, own: range) -> tuple[Tensor, Tensor]:
    """The column of each target, *Shape:* :math:`(N,1)`, and whether it is this rank's, *Shape:*
    :math:`(N)`; found without asking the device."""
    local = target - own.start
    held = (local >= 0) & (local < len(own))
    return local.clamp(0, max(len(own) - 1, 0))[:, None], held


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor``, rounded to ``dtype`` once: ``factor`` holds the loss scale of fp16,
    and what bf16 would round alike for all gradients.

    To be called in the backward of what has saved ``gradient``, which is overwritten if its dtype
    is that and it will not be needed again.
    """
    if not factor.ndim:
        factor = factor[None]  # A scalar would be rounded to the dtype of a gradient on CUDA.
    if gradient.dtype == dtype and not is_needed_again():
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
