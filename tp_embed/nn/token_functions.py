"""Losses, entropies and divergences of tokens, and their gradients, from logits that are sharded
over a gang.

Each function summarizes the logits of a rank in a few numbers per token. These are gathered over
the ranks and combined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.gang.collectives import gather_columns, reduce_partial
from tp_embed.nn.columns import add_to_picked, parts_of, picked
from tp_embed.nn.token_loss import LossOptions
from tp_embed.partition import Partition

T = TypeVar("T")


@dataclass(frozen=True)
class TokenFunction(ABC):
    """Maps the logits of each token to a value, or to K values."""

    # How many logits it compares: 2 for those of a student and a teacher.
    num_logits = 1
    # Whether :meth:`differentiate` needs temporaries.
    needs_parts = True

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that the function depends on, besides the logits."""
        return ()

    def with_tensors(self, *tensors: Tensor | None) -> Self:
        """Returns the function of other ``tensors``."""
        return self

    def of_tokens(self, tokens: slice) -> Self:
        """Returns the function of some tokens only."""
        return self

    @abstractmethod
    def summarize(self, logits: Sequence[Tensor], own: range) -> Tensor:
        """Summarizes the logits of this rank. Overwrites them.

        :param logits: *Shape:* :math:`(V_{rank},n)` each. *Dtype:* fp32 or fp64.
        :param own: the classes of this rank.
        :returns: the maximum of each of ``logits``, and sums over the classes. *Shape:*
            :math:`(C,n)`.
        """

    @abstractmethod
    def sums(self, logits: Sequence[Tensor], maxima: Sequence[Tensor], own: range) -> Tensor:
        """Computes the sums of :meth:`summarize` with differentiable operations, for maxima over
        all ranks."""

    @abstractmethod
    def combine(self, summaries: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Combines the summaries of all ranks, *Shape:* :math:`(P,C,N)`. Differentiable.

        :returns: the values, *Shape:* :math:`(N)` or :math:`(N,K)`, and what
            :meth:`differentiate` needs, *Shape:* :math:`(N)` each.
        """

    @abstractmethod
    def differentiate(
        self, logits: Sequence[Tensor], classes: range, saved: Sequence[Tensor], grad: Tensor
    ) -> None:
        """Overwrites the first of ``logits`` with its gradient, and the others with anything.

        :param logits: a part of them, for ``classes``. *Shape:* :math:`(V_{part},n)` each.
        :param grad: the gradient of the values. *Shape:* :math:`(n)` or :math:`(n,K)`.
        """

    @abstractmethod
    def bound(self, saved: Sequence[Tensor], grad: Tensor) -> Tensor:
        """Returns at least the sum over the classes of the absolute values of the gradients of
        :meth:`differentiate`. *Shape:* :math:`(n)`."""

    def compose(
        self, logits: Sequence[Tensor], own: range, gang: Gang, classes: Partition
    ) -> Tensor:
        """Computes the values with differentiable operations: for derivatives of any order,
        transforms and graphs.

        Does an all-gather of N numbers per rank and an all-reduce of C N.
        """
        maxima = [_highest(z.detach()) for z in logits]
        ranks = Partition(gang.size, gang.size)
        maxima = [gather_columns(m[:, None], gang, ranks).amax(-1) for m in maxima]
        sums = reduce_partial(self.sums(logits, maxima, own), gang)
        values, _ = self.combine(torch.cat([torch.stack(maxima), sums])[None])
        return values


@dataclass(frozen=True)
class TokenLosses(TokenFunction):
    """The losses of :class:`~tp_embed.nn.token_loss.LossOptions` of K targets per token, with
    weights :math:`w` of the classes:

    .. math:: -(1-\\epsilon) w_t \\log p_t - \\frac{\\epsilon}{V} \\sum_v w_v \\log p_v
        + z \\log^2 Z

    as in :func:`torch.nn.functional.cross_entropy`.

    :param target: *Shape:* :math:`(N,K)`. *Dtype:* int64.
    :param class_weight: *Shape:* :math:`(V)`.
    """

    target: Tensor
    class_weight: Tensor | None
    options: LossOptions
    num_classes: int

    needs_parts = False

    def check(self) -> None:
        """
        :raises ValueError: ``class_weight`` has another shape, an integer dtype or a gradient, or
            comes with a z-loss.
        """
        weight = self.class_weight
        if weight is None:
            return
        if weight.shape != (self.num_classes,) or not weight.is_floating_point():
            raise ValueError(
                f"`weight` must have the shape {(self.num_classes,)}, a weight for each class, "
                "whole on each rank, and a floating dtype, but has the shape "
                f"{tuple(weight.shape)} and the dtype {weight.dtype} instead."
            )
        if weight.requires_grad:
            raise ValueError(
                "`weight` must not require a gradient: the loss has none for it, as in torch. Pass "
                "`weight.detach()`."
            )
        if self.options.z_loss:
            raise ValueError(
                "`weight` must be None with `z_loss`, whose weighted mean is not defined. Compute "
                "both losses with `reduction='none'` and combine them."
            )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.target, self.class_weight

    def with_tensors(self, *tensors: Tensor | None) -> Self:
        target, class_weight = tensors
        assert target is not None
        return replace(self, target=target, class_weight=class_weight)

    def of_tokens(self, tokens: slice) -> Self:
        return replace(self, target=self.target[tokens])

    def summarize(self, logits: Sequence[Tensor], own: range) -> Tensor:
        (z,) = logits
        of_targets = picked(z, self.target, own)
        highest = _highest(z)
        z.sub_(highest)
        smooth = self._smooth_sums(z, own)
        return torch.stack([highest, z.exp_().sum(0), *smooth, *of_targets])

    def sums(self, logits: Sequence[Tensor], maxima: Sequence[Tensor], own: range) -> Tensor:
        of_targets = picked(logits[0], self.target, own)
        z = logits[0] - maxima[0]
        return torch.stack([z.exp().sum(0), *self._smooth_sums(z, own), *of_targets])

    def combine(self, summaries: Tensor) -> tuple[Tensor, list[Tensor]]:
        highest, shift, total = _normalizer(summaries[:, 0], summaries[:, 1])
        start = 4 if self.options.label_smoothing else 2
        # In the order of the subtractions, so that nothing is lost if logits share an offset.
        of_targets = summaries[:, start:].sum(0).T  # (N, K)
        log_p = of_targets - highest[:, None] - total.log()[:, None]
        losses = -self._weight_of_targets(log_p) * log_p
        if epsilon := self.options.label_smoothing:
            weights, sums = summaries[:, 2], summaries[:, 3]
            smooth = weights.sum(0) * total.log() + (weights * shift - sums).sum(0)
            losses = losses + epsilon / self.num_classes * smooth[:, None]
        if self.options.z_loss:
            log_sum = highest + total.log()
            losses = losses + self.options.z_loss * log_sum.square()[:, None]
        return losses.masked_fill(self._ignored, 0.0), [highest, total]

    def differentiate(
        self, logits: Sequence[Tensor], classes: range, saved: Sequence[Tensor], grad: Tensor
    ) -> None:
        (z,), (highest, total) = logits, saved
        epsilon = self.options.label_smoothing / self.num_classes
        grad = grad.masked_fill(self._ignored, 0.0)  # (n, K)
        targets = self._weight_of_targets(grad) * grad
        factor = targets.sum(-1)
        if epsilon:
            weights = self._weights(range(self.num_classes), grad)
            factor = factor + epsilon * weights.sum() * grad.sum(-1)
        if self.options.z_loss:
            log_sum = highest + total.log()
            factor = factor + 2 * self.options.z_loss * log_sum * grad.sum(-1)
        z.sub_(highest).exp_().mul_(factor / total)
        if epsilon:
            z.addr_(self._weights(classes, grad), grad.sum(-1), alpha=-epsilon)
        add_to_picked(z, self.target, classes, -targets)
        z.masked_fill_(self._ignored.all(-1), 0.0)  # Their logits may be NaN.

    def bound(self, saved: Sequence[Tensor], grad: Tensor) -> Tensor:
        highest, total = saved
        grad = grad.masked_fill(self._ignored, 0.0)
        both = grad.sum(-1).abs()
        bound = 2 * (self._weight_of_targets(grad) * grad).abs().sum(-1)
        if epsilon := self.options.label_smoothing / self.num_classes:
            weights = self._weights(range(self.num_classes), grad)
            bound = bound + 2 * epsilon * weights.abs().sum() * both
        if self.options.z_loss:
            bound = bound + 2 * self.options.z_loss * (highest + total.log()).abs() * both
        return bound.masked_fill(self._ignored.all(-1), 0.0)

    @property
    def _ignored(self) -> Tensor:
        return self.target == self.options.ignore_index

    def _weights(self, classes: range, like: Tensor) -> Tensor:
        if self.class_weight is None:
            return like.new_ones(len(classes))
        return self.class_weight[classes.start : classes.stop].to(like.dtype)

    def _weight_of_targets(self, like: Tensor) -> Tensor:
        """*Shape:* :math:`(N,K)`, or :math:`()` without class weights."""
        factor = like.new_full((), 1 - self.options.label_smoothing)
        if self.class_weight is None:
            return factor
        return factor * self.class_weight.to(like.dtype)[self.target.masked_fill(self._ignored, 0)]

    def _smooth_sums(self, z: Tensor, own: range) -> tuple[Tensor, ...]:
        if not self.options.label_smoothing:
            return ()
        weights = self._weights(own, z)
        return weights.sum().expand(z.size(1)), weights @ z


@dataclass(frozen=True)
class Entropy(TokenFunction):
    """:math:`-\\sum_v p_v \\log p_v`, where classes with a logit of -inf add nothing."""

    def summarize(self, logits: Sequence[Tensor], own: range) -> Tensor:
        (z,) = logits
        highest = _highest(z)
        sums = z.new_zeros(2, z.size(1))
        for rows in parts_of(z, split=True):
            part = z[rows].sub_(highest)
            weights = part.exp()
            sums[0] += weights.sum(0)
            sums[1] += _finite(part).mul_(weights).sum(0)
        return torch.cat([highest[None], sums])

    def sums(self, logits: Sequence[Tensor], maxima: Sequence[Tensor], own: range) -> Tensor:
        z = logits[0] - maxima[0]
        weights = z.exp()
        return torch.stack([weights.sum(0), (weights * _without_inf(z, z)).sum(0)])

    def combine(self, summaries: Tensor) -> tuple[Tensor, list[Tensor]]:
        maxima, weights, products = summaries.unbind(1)
        highest, shift, total = _normalizer(maxima, weights)
        mean = ((products - shift * weights) * (-shift).exp()).sum(0) / total
        entropy = total.log() - mean
        return entropy, [highest, total, entropy]

    def differentiate(
        self, logits: Sequence[Tensor], classes: range, saved: Sequence[Tensor], grad: Tensor
    ) -> None:
        (z,), (highest, total, entropy) = logits, saved
        weights = z.sub_(highest).exp()
        _finite(z).add_(entropy - total.log()).mul_(weights).mul_(-grad / total)

    def bound(self, saved: Sequence[Tensor], grad: Tensor) -> Tensor:
        # Of p |log p + H| for each class: at most twice the entropy, H.
        return 2 * grad.abs() * (saved[2].abs() + 1)


@dataclass(frozen=True)
class Divergence(TokenFunction):
    """The Kullback-Leibler divergence between the first logits, of a student, and the second ones,
    of a teacher: KL(teacher || student), or KL(student || teacher) if ``reverse``.

    A class that only the first distribution of the two has makes it infinite.
    """

    reverse: bool

    num_logits = 2

    def summarize(self, logits: Sequence[Tensor], own: range) -> Tensor:
        a, b = self._ordered(logits)
        maxima = _highest(a), _highest(b)
        sums = a.new_zeros(3, a.size(1))
        for rows in parts_of(a, split=True):
            of_a, of_b = a[rows].sub_(maxima[0]), b[rows].sub_(maxima[1])
            weights, impossible = _weights(of_a)
            sums[0] += weights.sum(0)
            terms = of_a.sub_(of_b).masked_fill_(impossible, 0.0)
            sums[2] += terms.mul_(weights).sum(0)
            sums[1] += of_b.exp_().sum(0)
        return torch.cat([torch.stack(self._ordered(maxima)), sums])

    def sums(self, logits: Sequence[Tensor], maxima: Sequence[Tensor], own: range) -> Tensor:
        pairs = zip(logits, maxima, strict=True)
        a, b = self._ordered([z - highest for z, highest in pairs])
        weights = a.exp().clamp(min=torch.finfo(a.dtype).tiny)
        terms = weights * (_without_inf(a, a) - _without_inf(b, a))
        return torch.stack([weights.sum(0), b.exp().sum(0), terms.sum(0)])

    def combine(self, summaries: Tensor) -> tuple[Tensor, list[Tensor]]:
        maxima = self._ordered([summaries[:, 0], summaries[:, 1]])
        weights, others, products = summaries[:, 2:].unbind(1)
        highest_a, shift_a, total_a = _normalizer(maxima[0], weights)
        highest_b, shift_b, total_b = _normalizer(maxima[1], others)
        products = products + (shift_b - shift_a) * weights
        mean = (products * (-shift_a).exp()).sum(0) / total_a
        divergence = mean - total_a.log() + total_b.log()
        saved = [*self._ordered([highest_a, highest_b]), *self._ordered([total_a, total_b])]
        return divergence, [*saved, divergence]

    def differentiate(
        self, logits: Sequence[Tensor], classes: range, saved: Sequence[Tensor], grad: Tensor
    ) -> None:
        student, teacher = logits
        of_student, of_teacher, total, total_teacher, divergence = saved
        student.sub_(of_student)
        teacher.sub_(of_teacher)
        if not self.reverse:
            student.exp_().mul_(grad / total)
            student.sub_(teacher.exp_().mul_(grad / total_teacher))
            return
        weights, impossible = _weights(student)
        student.sub_(teacher).add_(total_teacher.log() - total.log() - divergence)
        student.masked_fill_(impossible, 0.0).mul_(weights).mul_(grad / total)

    def bound(self, saved: Sequence[Tensor], grad: Tensor) -> Tensor:
        if not self.reverse:
            return 2 * grad.abs()
        # Of p |log(p/q) - KL| for each class: at most 2 KL + 2/e (Cover and Thomas, 2006).
        return (2 * grad.abs() * (saved[4].abs() + 1)).masked_fill(grad == 0, 0.0)

    def _ordered(self, pair: Sequence[T]) -> tuple[T, T]:
        """Puts the distribution first that weights the terms. Its own inverse."""
        student, teacher = pair
        return (student, teacher) if self.reverse else (teacher, student)


def _highest(z: Tensor) -> Tensor:
    """Returns the maximum over the classes; finite, even if all are -inf or there are none."""
    if not len(z):
        return z.sum(0) + torch.finfo(z.dtype).min
    return z.amax(0).clamp_(min=torch.finfo(z.dtype).min)


def _finite(z: Tensor) -> Tensor:
    """Replaces -inf in place, for a product with 0."""
    return z.clamp_(min=torch.finfo(z.dtype).min)


def _without_inf(z: Tensor, where: Tensor) -> Tensor:
    """Replaces the items of ``z`` where ``where`` is -inf; their gradient is zero."""
    return torch.where(where == -torch.inf, 0.0, z)


def _weights(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns exp() of the logits, and which classes are impossible. The others stay above zero, so
    that their product with infinity is infinite."""
    weights = shifted.exp().clamp_(min=torch.finfo(shifted.dtype).tiny)
    return weights, shifted == -torch.inf


def _normalizer(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combines sums of exp(logit - maximum) of the ranks, *Shape:* :math:`(P,N)` each.

    :returns: the maximum over the ranks, its distance from each rank's, *Shape:* :math:`(P,N)`,
        and the sum of exp(logit - maximum).
    """
    highest = maxima.amax(0)
    shift = highest - maxima
    return highest, shift, (sums * (-shift).exp()).sum(0)
