"""The softmax of logits that come in blocks of classes and are sharded over a gang, the losses of
tokens, and the gradients of their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.nn.token_loss import LossOptions, cap_, own_targets


class BlockedSoftmax:
    """Sums over the classes of n tokens, from a block of logits at a time.
    *Shape:* :math:`(V_{block},n)`.

    Call :meth:`add` with each block of this rank, then :meth:`combine`, which returns the losses;
    then :meth:`to_gradient` with what :meth:`add` left, or :meth:`gradient_of` with logits.

    :param target: *Shape:* :math:`(n)`. *Dtype:* int64.
    :param dtype: fp32 or fp64.
    """

    def __init__(self, target: Tensor, dtype: torch.dtype, options: LossOptions) -> None:
        self._target = target
        self._options = options
        self._ignored = target == options.ignore_index
        # The highest logit, kept apart from the sum of exponentials: their log-sum-exp would round
        # off the sum if all logits are large. Finite, so that logits may be -inf.
        highest = target.new_full(target.shape, torch.finfo(dtype).min, dtype=dtype)
        sums = highest.new_zeros(3, len(target))
        self._parts = torch.cat([highest[None], sums])

    def add(self, logits: Tensor, classes: range, slope: Tensor | None = None) -> Tensor:
        """Adds the logits of ``classes``, and overwrites them with their exponentials relative to
        the highest of the block, which it returns. *Shape:* :math:`(n)`.

        :param slope: with a soft cap, takes the slope of the cap at each logit.
        """
        self._transform(logits, slope)
        old, sums, picked, total = self._parts
        column, held = own_targets(self._target, classes)
        picked += logits.gather(0, column.T)[0].masked_fill(~held, 0.0)  # Others may be -inf.
        if self._options.label_smoothing:
            total += logits.sum(0)
        highest = logits.amax(0).clamp_(min=torch.finfo(logits.dtype).min)
        logits.sub_(highest).exp_()
        new = torch.maximum(old, highest)
        sums.mul_((old - new).exp_()).add_(logits.sum(0).mul_((highest - new).exp_()))
        old.copy_(new)
        return highest

    def combine(self, gang: Gang, num_classes: int) -> Tensor:
        """Combines the sums of all ranks, and returns the loss of each token. *Shape:* :math:`(n)`.

        Does one all-gather of 3 n numbers per rank, with label smoothing 4 n.
        """
        smoothing, z_loss = self._options.label_smoothing, self._options.z_loss
        parts = self._parts if smoothing else self._parts[:3]
        if gang.size > 1:
            every = parts.new_empty(gang.size, *parts.shape)
            gang.all_gather(every, parts.contiguous())
            highest = every[:, 0].amax(0)
            every[:, 1] *= (every[:, 0] - highest).exp_()
            parts = torch.cat([highest[None], every[:, 1:].sum(0)])
        self.highest, sums = parts[0], parts[1]
        losses = sums.log() + (1 - smoothing) * (self.highest - parts[2])
        if smoothing:
            losses += smoothing * (self.highest - parts[3] / num_classes)
        self._factor = sums.reciprocal()
        if z_loss:
            log_sum = sums.log() + self.highest
            losses += z_loss * log_sum.square()
            self._factor *= 1 + 2 * z_loss * log_sum
        self._off = smoothing / num_classes
        return losses.masked_fill_(self._ignored, 0.0)

    def divide_gradients(self, divisor: Tensor) -> None:
        """Divides the gradients of all tokens by ``divisor``. *Shape:* :math:`()`."""
        weight = (self._factor.new_ones(()) / divisor).expand_as(self._factor)
        self._weight = weight.masked_fill(self._ignored, 0.0)
        self._factor = self._factor * self._weight

    def gradient_of(self, logits: Tensor, classes: range) -> None:
        """Overwrites the logits of ``classes`` with their gradient."""
        slope = None if self._options.soft_cap is None else torch.empty_like(logits)
        self._transform(logits, slope)
        logits.sub_(self.highest).exp_()
        self.to_gradient(logits, self.highest, classes, slope)

    def to_gradient(
        self, logits: Tensor, highest: Tensor, classes: range, slope: Tensor | None = None
    ) -> None:
        """Overwrites exponentials relative to ``highest`` with the gradient of the logits."""
        logits.mul_((highest - self.highest).exp_().mul_(self._factor))
        if self._off:
            logits.sub_(self._weight * self._off)
        column, held = own_targets(self._target, classes)
        own = self._weight * (self._options.label_smoothing - 1)
        logits.scatter_add_(0, column.T, own.masked_fill(~held, 0.0)[None])
        if slope is not None:
            logits.mul_(slope)
        if self._options.scale != 1.0:
            logits.mul_(self._options.scale)
        if logits.device.type != "cpu":  # The CPU leaves out ignored tokens, which may be NaN.
            logits.masked_fill_(self._ignored, 0.0)

    def _transform(self, logits: Tensor, slope: Tensor | None) -> None:
        """Scales and caps logits in place."""
        if self._options.scale != 1.0:
            logits.mul_(self._options.scale)
        if self._options.soft_cap is not None:
            cap_(logits, self._options.soft_cap, slope)
