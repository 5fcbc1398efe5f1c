"""Log-probabilities, entropies, divergences and the largest logits of each token, from hidden
states and a sharded output head, without holding all logits.

The forward computes the logits of a chunk of tokens at a time, and keeps a few numbers per token.
The backward computes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tp_embed._torch_private import is_transformed
from tp_embed.gang import Gang
from tp_embed.gang.blocks import in_graph
from tp_embed.gang.collectives import is_batched
from tp_embed.nn.chunks import (
    Gradients,
    Head,
    Projection,
    Source,
    chunks_of,
    class_blocks_of,
    without_autocast,
)
from tp_embed.nn.columns import parts_of
from tp_embed.nn.token_functions import Divergence, Entropy, TokenFunction, TokenLosses
from tp_embed.nn.token_loss import (
    LossOptions,
    check_reduction,
    check_target,
    weights_of_targets,
)
from tp_embed.nn.top_k import Chosen, check_k, local_top_k, merged_top_k
from tp_embed.parameter.sharded import local, unguarded

__all__ = ["ChunkedProjection", "divergences", "entropies", "reduced_loss", "token_losses", "top_k"]


@dataclass(frozen=True)
class ChunkedProjection(Projection):
    """Computes the logits of a chunk of tokens at a time."""

    def values(self, function: TokenFunction, *teachers: Projection) -> Tensor:
        values: Tensor = _values([self, *teachers], function)
        return values


class _TokenValues(torch.autograd.Function):
    """The values of a :class:`TokenFunction`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: Sequence[Head],
        function: TokenFunction,
        *constants: Tensor | None,
    ) -> Tensor:
        """``constants`` are hidden states, weight and bias of the teacher, if there is one, and the
        tensors of ``function``."""
        inputs = x, weight, bias, *constants
        sources = [source.narrowed() for source in _sources(heads, inputs)]
        parts = []
        for tokens, logits in chunks_of(sources):
            for source, out in zip(sources, logits, strict=True):
                source.compute(tokens, out)
                source.head.cap(out)
            parts.append(function.of_tokens(tokens).summarize(logits, heads[0].own))
        values, saved = function.combine(_gathered(torch.cat(parts, 1), heads[0].gang))
        ctx.save_for_backward(*inputs, *saved)
        ctx.context = heads, function, len(inputs)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, function, num_inputs = ctx.context
        tensors = ctx.saved_tensors  # Read once: checkpointing unpacks them only once.
        inputs, saved = tensors[:num_inputs], tensors[num_inputs:]
        function = function.with_tensors(*inputs[3 * len(heads) :])
        needs, nothing = ctx.needs_input_grad[:3], [None] * (len(ctx.needs_input_grad) - 3)
        sources = _sources(heads, inputs)
        if torch.is_grad_enabled() or is_batched(grad):
            # Needs derivatives of the gradient, or several gradients at once.
            return *_composed_gradients(sources, function, needs, grad), *nothing
        gradients = Gradients(sources[0], needs, grad / heads[0].temperature)
        teachers = [source._replace(x=source.chunk(slice(None))) for source in sources[1:]]
        sources = [gradients.source, *teachers]
        for rows, logits in class_blocks_of(sources):
            for source, out in zip(sources, logits, strict=True):
                source.of_block(rows).compute(slice(None), out)
            _differentiate(logits, rows, heads, function, saved, gradients.grad)
            gradients.add(rows, logits[0])
        return *gradients.results(), *nothing


def _sources(heads: Sequence[Head], inputs: Sequence[Any]) -> list[Source]:
    return [Source(head, *inputs[3 * i : 3 * i + 3]) for i, head in enumerate(heads)]


def _gathered(summaries: Tensor, gang: Gang) -> Tensor:
    """Returns the summaries of all ranks, *Shape:* :math:`(P,C,N)`."""
    if gang.size == 1:
        return summaries[None]
    gathered = summaries.new_empty(gang.size, *summaries.shape)
    gang.all_gather(gathered, summaries)
    return gathered


def _differentiate(
    logits: Sequence[Tensor],
    rows: slice,
    heads: Sequence[Head],
    function: TokenFunction,
    saved: Sequence[Tensor],
    grad: Tensor,
) -> None:
    """Overwrites the first of ``logits``, those of ``rows`` without a cap, with its gradient."""
    first = heads[0].own.start + rows.start
    for part in parts_of(logits[0], split=function.needs_parts or heads[0].soft_cap is not None):
        parts = [z[part] for z in logits]
        for head, z in zip(heads, parts, strict=True):
            head.cap(z)
        slope = heads[0].slope(parts[0])
        start = first + part.start
        function.differentiate(parts, range(start, start + len(parts[0])), saved, grad)
        if slope is not None:
            parts[0].mul_(slope)


def _compose(sources: Sequence[Source], function: TokenFunction | Chosen) -> Tensor:
    """Computes the values with differentiable operations, holding all logits."""
    head, logits = sources[0].head, [source.compose() for source in sources]
    with without_autocast(sources[0].x):
        return function.compose(logits, head.own, head.gang, head.classes)


def _composed_gradients(
    sources: Sequence[Source],
    function: TokenFunction | Chosen,
    needs: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Computes the gradients with differentiable operations."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), unguarded():
        # Views, since `x` may depend on `weight`: part of its gradient would count twice.
        student = sources[0].views()
        values = _compose([student, *sources[1:]], function)
        pairs = zip((student.x, student.weight, student.bias), needs, strict=True)
        inputs = [view for view, need in pairs if need and view is not None]
        found = iter(torch.autograd.grad(values, inputs, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, head: Head, k: int
    ) -> tuple[Tensor, Tensor]:
        source = Source(head, x, weight, bias).narrowed()
        found = []
        for tokens, (z,) in chunks_of([source], tokens_first=True):
            source.compute(tokens, z)
            head.cap(z)
            found.append(local_top_k(z, k, head.own, head.classes, in_place=True))
        values, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        values, ids = merged_top_k(values, ids, k, head.gang)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(x, weight, bias, values, ids)
        ctx.head = head
        return values, ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, values, ids = ctx.saved_tensors
        needs, function = ctx.needs_input_grad[:3], Chosen(ids)
        source = Source(ctx.head, *inputs)
        if torch.is_grad_enabled() or is_batched(grad):
            return *_composed_gradients([source], function, needs, grad), None, None
        slope = ctx.head.slope(values)
        gradients = Gradients(source, needs, grad if slope is None else grad * slope)
        first = ctx.head.own.start
        for rows, (z,) in class_blocks_of([source]):
            function.scatter(z, range(first + rows.start, first + rows.stop), gradients.grad)
            gradients.add(rows, z)
        return *gradients.results(), None, None


def token_losses(
    projection: Projection,
    target: Tensor,
    class_weight: Tensor | None = None,
    options: LossOptions | None = None,
) -> Tensor:
    """Computes the cross entropy of each target, as :func:`torch.nn.functional.cross_entropy` does
    with ``reduction="none"``. With weights :math:`w` of the classes, see
    :class:`~tp_embed.nn.loss.LossOptions` for the rest:

    .. math:: -(1-\\epsilon) w_t \\log p_t - \\frac{\\epsilon}{V} \\sum_v w_v \\log p_v
        + z \\log^2 Z

    Does one all-gather of 2 + K (with label smoothing 4 + K) numbers per token. The CPU skips
    tokens whose targets are all ignored.

    :param target: the same on every rank. *Shape:* :math:`(*)`, or :math:`(*,K)` for K targets per
        token.
    :param class_weight: the same on every rank. *Shape:* :math:`(V)`.
    :param options: without ``soft_cap``, which ``projection`` has.
    :returns: the loss of each target; zero for ignored ones. *Shape:* that of ``target``. *Dtype:*
        fp32, or fp64 for fp64.
    :raises ValueError: shapes do not match, or an option is out of range.
    :raises IndexError: a target is neither a class nor ``ignore_index``. On an accelerator, a
        device-side assertion fails instead, as in torch.
    """
    options = options or LossOptions()
    options.check()
    if options.scale != 1.0:
        projection = projection.scaled(options.scale)
    x, classes = projection.x, projection.classes
    tokens = x.shape[:-1]
    if tokens not in (target.shape, target.shape[:-1]):
        raise ValueError(
            f"`target` must have the shape {tuple(tokens)}, one class for each token, or one more "
            f"dimension for several, but has {tuple(target.shape)} instead."
        )
    flat = check_target(target, options.ignore_index, classes)
    flat = flat.view(tokens.numel(), target.shape[len(tokens) :].numel())
    function = TokenLosses(flat, class_weight, options, classes.size)
    function.check()
    kept = (flat != options.ignore_index).any(-1)
    if x.device.type != "cpu" or is_transformed() or in_graph(x) or kept.all():
        losses = projection.values(function)
        return losses.view(target.shape)
    index = kept.nonzero()[:, 0]
    x = x.reshape(len(flat), x.size(-1)).index_select(0, index)
    losses = replace(projection, x=x).values(replace(function, target=flat[index]))
    return losses.new_zeros(flat.shape).index_copy(0, index, losses).view(target.shape)


def reduced_loss(
    projection: Projection,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    options: LossOptions,
) -> Tensor:
    """Reduces :func:`token_losses` as :func:`torch.nn.functional.cross_entropy` does: ``"mean"``
    divides by the sum of the weights of the targets. Refuses several targets per token.

    :raises ValueError: as :func:`token_losses`, or ``reduction`` is invalid.
    """
    check_reduction(projection.x.shape[:-1], target, reduction)
    losses = token_losses(projection, target, class_weight, options)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # As in torch, the mean over no token is NaN; here with a zero gradient.
    total = weights_of_targets(target, class_weight, options, losses.dtype).sum()
    nan = total.new_zeros(()).masked_fill(total == 0, torch.nan)
    return losses.sum() / total.masked_fill(total == 0, 1.0) + nan


def entropies(projection: Projection) -> Tensor:
    """Computes the entropy of each token's distribution, in nats. Classes with a logit of -inf add
    nothing. Does one all-gather of 3 numbers per token.

    :returns: *Shape:* :math:`(*)`. *Dtype:* fp32, or fp64 for fp64.
    """
    return projection.values(Entropy()).view(projection.x.shape[:-1])


def divergences(student: Projection, teacher: Projection, *, reverse: bool = False) -> Tensor:
    """Computes KL(teacher || student) for each token, or KL(student || teacher) if ``reverse``. The
    teacher gets no gradient. Does one all-gather of 5 numbers per token.

    :param teacher: of the same tokens, classes and ranks.
    :returns: *Shape:* :math:`(*)`. *Dtype:* fp32, or fp64 for fp64.
    """
    bias = None if teacher.bias is None else teacher.bias.detach()
    fixed = replace(teacher, x=teacher.x.detach(), weight=local(teacher.weight), bias=bias)
    return student.values(Divergence(reverse), fixed).view(student.x.shape[:-1])


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="Its loops over chunks would be unrolled."
)
def top_k(projection: Projection, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k largest logits of each token, of equal ones the lowest ids first. Does two
    all-gathers, of k logits and k int64 ids per token and rank.

    :returns: logits, largest first, and ids. *Shape:* :math:`(*,k)`.
    :raises ValueError: ``k`` is not in [1, V].
    """
    projection.check()
    head, source, tokens = projection.head(), projection.flat_source(), projection.x.shape[:-1]
    check_k(k, head.classes)
    if is_transformed() or in_graph(projection.x):
        logits = source.compose()
        local = local_top_k(logits.detach(), k, head.own, head.classes, in_place=False)
        _, ids = merged_top_k(*local, k, head.gang)
        values = Chosen(ids).compose([logits], head.own, head.gang, head.classes)
    else:
        with without_autocast(source.x), unguarded():
            # Views stay when ZeRO 3 empties the Parameters after the forward.
            values, ids = _TopK.apply(*source.views()[1:], head, k)
    return values.view(*tokens, k), ids.view(*tokens, k)


# The compiler would unroll its loops into hundreds of products.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _values(projections: Sequence[Projection], function: TokenFunction) -> Tensor:
    for projection in projections:
        projection.check()
    sources = [projection.flat_source() for projection in projections]
    if is_transformed() or in_graph(projections[0].x):
        return _compose(sources, function)
    heads = [source.head for source in sources]
    with without_autocast(sources[0].x), unguarded():
        # Views stay when ZeRO 3 empties the Parameters after the forward.
        student, *others = [source.views()[1:] for source in sources]
        constants = [tensor for tensors in others for tensor in tensors]
        values: Tensor = _TokenValues.apply(
            *student, heads, function, *constants, *function.tensors
        )
    return values
