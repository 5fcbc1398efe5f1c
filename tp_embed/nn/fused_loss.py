"""The sum of the losses of tokens, and its gradients, from their hidden states and the weight of an
output head, without holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.nn.projection import (
    add_gradients,
    compute_logits,
    logits_operand,
    multiply,
    product_dtypes,
    row_blocks,
)
from tp_embed.nn.softmax import BlockedSoftmax
from tp_embed.nn.token_loss import LossOptions
from tp_embed.partition import Partition

# Logits that are held in memory of their own have at least this size, in fp32.
_CHUNK_BYTES = 1 << 20

# Products of fewer tokens are slow (by a quarter with 64 tokens, by a half with 32), so computing
# the logits twice, for all tokens, is faster.
_MIN_TOKENS = 64


class FusedHead(NamedTuple):
    """An output head that is sharded over a gang, and the loss of its logits.

    :param sum_over: sums the logits over its ranks, which hold columns of the weight.
    :param gang: its ranks hold the classes of ``classes``.
    :param widths: the number of columns of the weight of each rank of ``sum_over``.
    """

    sum_over: Gang
    gang: Gang
    classes: Partition
    widths: tuple[int, ...]
    options: LossOptions


class Results(NamedTuple):
    """The sum of the losses, and the gradients that are needed."""

    total: Tensor
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Group(NamedTuple):
    """Tokens whose logits are held at once.

    :param logits: *Shape:* :math:`(V_{rank},n)`. *Dtype:* fp32 or fp64.
    :param slopes: of a soft cap. *Shape:* :math:`(V_{rank},n)`.
    :param kept: where to put the gradients of the logits, in the dtype of products; ``None`` if the
        gradient of the weight can be added now.
    """

    tokens: slice
    logits: Tensor
    slopes: Tensor | None
    kept: Tensor | None


class FusedLoss:
    """Computes the sum of the losses of tokens, and its gradients divided by ``divisor``.

    Gradients need the softmax of a token, and so all its logits. For the first E tokens or so, the
    memory of the weight's gradient, *Shape:* :math:`(V_{rank},E)`, holds the logits and then their
    gradients, until one product per block of classes writes the weight's gradient over them.

    If that gradient is in the dtype of the sums, it then accumulates the other tokens, a chunk of
    tokens at a time. Where it is in bf16, which would round each sum, or where chunks would have
    too few tokens, the logits of the other tokens are computed twice, for a block of classes and
    all these tokens at a time: for the softmax, and for the gradients.

    :param x: *Shape:* :math:`(N,E)`.
    :param weight: *Shape:* :math:`(V_{rank},E)`.
    :param bias: *Shape:* :math:`(V_{rank})`.
    :param target: *Shape:* :math:`(N)`. *Dtype:* int64.
    :param divisor: *Shape:* :math:`()`.
    """

    def __init__(
        self,
        head: FusedHead,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        divisor: Tensor,
    ) -> None:
        self._head, self._x, self._bias = head, x, bias
        self._target, self._divisor = target, divisor
        _, self._dtype = product_dtypes(x, weight)
        self._wide = torch.promote_types(self._dtype, torch.float32)
        # The dtype of gradients of logits in products for the weight: fp16 can't hold small ones,
        # which are not yet multiplied by the loss scale, and large sums.
        self._low = self._wide if self._dtype == torch.float16 else self._dtype
        # Tensors like the logits: the logits, and the slopes of a cap.
        self._buffers = 1 if head.options.soft_cap is None else 2
        self._classes = head.classes.shard(head.gang.rank)
        # Take sizes from the largest shard, so that all ranks do the same collectives.
        width = sum(head.widths)
        self._budget = max(_CHUNK_BYTES // 4, width * (2 * len(x) + width))
        if self._dtype.itemsize < weight.itemsize:
            weight = weight.to(self._dtype)  # For autocast; wider casts are done per block.
        self._weight = weight
        self._blocks = row_blocks(weight, max(head.widths), self._budget // max(1, len(x)))
        self._total = x.new_zeros((), dtype=self._wide)

    def compute(self, needs: tuple[bool, bool, bool], accum_dtype: torch.dtype) -> Results:
        """
        :param needs: whether ``x``, ``weight`` and ``bias`` need a gradient.
        :param accum_dtype: bf16 for a weight's gradient in bf16, if this rank has all columns of
            the weight. Else it is in fp32, or fp64.
        """
        x, weight, bias = self._x, self._weight, self._bias
        # Each token completes its rows of the gradient of `x`; all tokens add to the others.
        computes_again = accum_dtype == torch.bfloat16 and self._head.sum_over.size == 1
        dtype = accum_dtype if computes_again else self._wide
        self._grad_x = torch.empty_like(x) if needs[0] else None
        self._grad_weight = weight.new_empty(weight.shape, dtype=dtype) if needs[1] else None
        self._grad_bias = None
        if bias is not None and needs[2]:
            self._grad_bias = torch.zeros_like(bias, dtype=self._wide)
        groups = list(self._kept_groups())
        rest = slice(groups[-1].tokens.stop if groups else 0, len(x))
        step = self._chunk_size() if any(needs) else 0
        softmax = None if step or rest.start == len(x) else self._sum_up(rest)
        if any(needs):
            for group in groups:
                self._backpropagate(group)
            again = rest if softmax is not None else slice(rest.start, rest.start)
            self._finish(groups, again, softmax)
            for group in self._chunks(rest, step):
                self._backpropagate(group)
        return Results(self._total, self._grad_x, self._grad_weight, self._grad_bias)

    def _kept_groups(self) -> Iterator[_Group]:
        """Splits the memory of the weight's gradient: the logits of a group are at the right end of
        what earlier groups left of each row, and the gradients of the logits at their right end."""
        gradient, widths = self._grad_weight, self._head.widths
        wide, low = self._wide, self._low
        if gradient is None or any(w * gradient.itemsize % wide.itemsize for w in widths):
            return
        free, start, end = min(widths) * gradient.itemsize // wide.itemsize, 0, len(self._x)
        while start < end:
            count = min(free // self._buffers, end - start)
            if count < min(max(1, _MIN_TOKENS), end - start):
                return
            logits = gradient.view(wide)[:, free - count : free]
            slopes = gradient.view(wide)[:, free - 2 * count : free - count]
            stop = free * wide.itemsize // low.itemsize
            kept = gradient.view(low)[:, stop - count : stop]
            yield _Group(
                slice(start, start + count), logits, slopes if self._buffers == 2 else None, kept
            )
            start += count
            free -= -(-count * low.itemsize // wide.itemsize)

    def _chunk_size(self) -> int:
        """Returns the number of tokens whose logits to hold in a buffer, or 0 for none."""
        if self._grad_weight is not None and self._grad_weight.dtype != self._wide:
            return 0
        count = self._budget // (self._buffers * max(1, self._head.classes.block))
        least = min(max(1, _MIN_TOKENS), len(self._x))
        if self._head.sum_over.size > 1:  # Computing logits twice would send them twice.
            return max(count, least)
        return count if count >= least else 0

    def _chunks(self, tokens: slice, step: int) -> Iterator[_Group]:
        """Splits ``tokens`` into groups of ``step`` tokens, which share a buffer."""
        if not step or tokens.start == tokens.stop:
            return
        rows, step = len(self._weight), min(step, tokens.stop - tokens.start)
        memory = self._x.new_empty(self._buffers, rows * step, dtype=self._wide)
        for start in range(tokens.start, tokens.stop, step):
            count = min(step, tokens.stop - start)
            logits, *slopes = memory[:, : rows * count].view(self._buffers, rows, count)
            yield _Group(slice(start, start + count), logits, slopes[0] if slopes else None, None)

    def _sum_up(self, tokens: slice) -> BlockedSoftmax:
        """Adds the losses of ``tokens``, a block of classes at a time."""
        softmax = BlockedSoftmax(self._target[tokens], self._wide, self._head.options)
        chunk = logits_operand(self._x[tokens].to(self._dtype), self._wide)
        for block in self._blocks:
            softmax.add(self._logits(chunk, block), self._classes[block])
        self._add_losses(softmax)
        return softmax

    def _add_losses(self, softmax: BlockedSoftmax) -> None:
        losses = softmax.combine(self._head.gang, self._head.classes.size)
        softmax.divide_gradients(self._divisor)
        self._total += losses.sum()

    def _logits(self, chunk: Tensor, block: slice, out: Tensor | None = None) -> Tensor:
        """Computes the logits of ``block``. *Shape:* :math:`(V_b,n)`."""
        weight, bias = self._weight[block], self._bias
        if out is None:
            # Classes first, so that products transpose only the tokens, which are fewer.
            out = weight.new_empty(len(weight), len(chunk), dtype=self._wide)
        bias = None if bias is None else bias[block]
        compute_logits(out, chunk, weight, bias, [slice(None)], self._head.sum_over)
        return out

    def _backpropagate(self, group: _Group) -> None:
        """Adds the losses of a group and its gradients, except for the weight's if it is kept."""
        chunk = self._x[group.tokens].to(self._dtype)
        softmax = BlockedSoftmax(self._target[group.tokens], self._wide, self._head.options)
        operand, highest = logits_operand(chunk, self._wide), []
        slopes = [None if group.slopes is None else group.slopes[b] for b in self._blocks]
        for block, slope in zip(self._blocks, slopes, strict=True):
            logits = self._logits(operand, block, group.logits[block])
            highest.append(softmax.add(logits, self._classes[block], slope))
        self._add_losses(softmax)
        sums = self._new_sums(chunk)
        for block, high, slope in zip(self._blocks, highest, slopes, strict=True):
            gradient = group.logits[block]
            softmax.to_gradient(gradient, high, self._classes[block], slope)
            grad_weight = None
            if group.kept is None and self._grad_weight is not None:
                grad_weight = self._grad_weight[block]
            low = self._add_block(gradient, chunk, block, sums, grad_weight)
            if group.kept is not None:  # In the same memory as `gradient`.
                group.kept[block] = low
        self._set_rows(group.tokens, sums)

    def _finish(self, groups: list[_Group], rest: slice, softmax: BlockedSoftmax | None) -> None:
        """Writes the weight's gradient of the groups and, with ``softmax``, all gradients of the
        rest, whose logits it computes again."""
        chunk = self._x[rest].to(self._dtype)
        tokens = self._x[: rest.stop].to(self._dtype).to(self._low)
        operand, sums = logits_operand(chunk, self._wide), self._new_sums(chunk)
        for block in self._blocks:
            parts = [group.kept[block] for group in groups if group.kept is not None]
            if softmax is not None:
                gradient = self._logits(operand, block)
                softmax.gradient_of(gradient, self._classes[block])
                parts.append(self._add_block(gradient, chunk, block, sums, None))
            if self._grad_weight is not None and parts:
                multiply(torch.cat(parts, 1), tokens, self._grad_weight[block])
            elif self._grad_weight is not None:
                self._grad_weight[block] = 0.0
        self._set_rows(rest, sums)

    def _add_block(
        self,
        gradient: Tensor,
        chunk: Tensor,
        block: slice,
        sums: Tensor | None,
        grad_weight: Tensor | None,
    ) -> Tensor:
        """Backpropagates the gradient of the logits of ``block``, and returns it in the dtype of
        products for the weight's gradient."""
        if self._grad_bias is not None:
            self._grad_bias[block] += gradient.sum(1)
        low = gradient.to(self._low)
        add_gradients(low, chunk, self._weight[block], [slice(None)], sums, grad_weight)
        return low

    def _new_sums(self, chunk: Tensor) -> Tensor | None:
        return None if self._grad_x is None else torch.zeros_like(chunk, dtype=self._wide)

    def _set_rows(self, tokens: slice, sums: Tensor | None) -> None:
        if self._grad_x is not None and sums is not None:
            self._grad_x[tokens] = sums
