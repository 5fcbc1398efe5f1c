"""The loss of each token, and its gradient, from logits that are cut over a gang."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tp_embed.backward import is_needed_again
from tp_embed.gang import Gang, ReduceOperation
from tp_embed.ids import as_indices
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
        an assertion on the device, as in torch.
    """
    target = as_indices(target).flatten().long()
    bad = (target != ignore_index) & ((target < 0) | (target >= classes.size))
    if target.device.type != "cpu":
        torch._assert_async(~bad.any())  # Does not wait for the answer.
    elif bad.any():
        position = int(bad.nonzero()[0])
        raise IndexError(
            f"All of `target` must be in [0, {classes.size}) or {ignore_index} (ignore_index), but "
            f"token {position} has {int(target[position])} instead."
        )
    return target


def token_losses(
    logits: Tensor,
    target: Tensor,
    gang: Gang,
    classes: Partition,
    options: LossOptions,
    *,
    gradient: bool,
    scratch: Tensor | None = None,
) -> Tensor:
    """The loss of each token; ``logits`` are overwritten, with its gradient by them if ``gradient``
    is true. Then a soft cap takes ``scratch``, which is like ``logits``, or else is made.

    Two all-reduces of N and of 2 N (with label smoothing 3 N) numbers.

    :param logits: this rank's part, in any memory layout. *Shape:* :math:`(N,V_{rank})`. *Dtype:*
        fp32 or fp64.
    :param target: *Shape:* :math:`(N)`. *Dtype:* int64.
    :returns: *Shape:* :math:`(N)`.
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

    # The column of each target, and whether it is this rank's; found without asking the device.
    local = target - own.start
    held = (local >= 0) & (local < len(own))
    column = local.clamp(0, max(len(own) - 1, 0))[:, None]
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
        return losses

    factor = sums[0].reciprocal()
    if options.z_loss:
        factor *= 1 + 2 * options.z_loss * log_sum
    logits.mul_(factor[:, None])
    if epsilon:
        logits.sub_(epsilon / classes.size)
    if own:
        logits.scatter_add_(1, column, ((epsilon - 1) * held)[:, None].to(logits.dtype))
    if slope is not None:
        logits.mul_(slope)
    logits.masked_fill_(ignored[:, None], 0.0)
    return losses


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
