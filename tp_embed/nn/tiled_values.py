"""The functions of :mod:`tp_embed.nn.token_values`, the fused loss, and the logits of an output
head, with the same bits at every size of the gang."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from tp_embed._torch_private import is_transformed
from tp_embed.gang.blocks import in_graph
from tp_embed.gang.collectives import is_batched
from tp_embed.nn.chunks import Projection, without_autocast
from tp_embed.nn.loss import check_accum_dtype
from tp_embed.nn.projection import product_dtypes
from tp_embed.nn.tiled import (
    MIN_TOKENS,
    Gradients,
    TiledHead,
    Tiles,
    chunks,
    differentiate,
    evaluate,
    most_tokens,
    tokens_of_tile,
)
from tp_embed.nn.tiles import Tiling, tile_size
from tp_embed.nn.token_functions import TokenFunction, TokenLosses
from tp_embed.nn.token_loss import (
    LossOptions,
    check_reduction,
    check_target,
    scaled,
    weights_of_targets,
)
from tp_embed.nn.token_values import token_losses
from tp_embed.nn.top_k import Chosen, check_k, local_top_k, merged_top_k
from tp_embed.parameter.sharded import unguarded
from tp_embed.partition import Partition

Deterministic = Literal["topology"] | None


@dataclass(frozen=True)
class TiledProjection(Projection):
    """Hidden states and the output head that projects them to logits, by tiles.

    :param x: whole hidden states, also for ``shard_dim`` 1. Their gradient is whole too. *Shape:*
        :math:`(*,E)`.
    :param bias: whole. *Shape:* :math:`(V)`.
    :param scale: multiplies logits, before the soft cap.
    """

    scale: float = 1.0

    @property
    def classes(self) -> Partition:
        return Partition(self.weight.size(0) if self.shard_dim else self.partition.size, 1)

    def tiled_head(self) -> TiledHead:
        place = self.gang, self.partition, self.shard_dim
        size = tile_size(self.x.device)
        tiling = Tiling(*place, self.classes.size, self.x.size(-1), size)
        return TiledHead(self.head(), tiling, self.scale)

    def values(self, function: TokenFunction, *teachers: Projection) -> Tensor:
        sides: list[TiledProjection] = [self, *teachers]  # type: ignore[list-item]
        for side in sides:
            side.check()
        _check_plain(self.x)
        heads = [side.tiled_head() for side in sides]
        with without_autocast(self.x), unguarded():
            own, *others = [side.tensors() for side in sides]
            constants = [tensor for tensors in others for tensor in tensors]
            values: Tensor = _Values.apply(*own, heads, function, *constants, *function.tensors)
        return values

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns x, *Shape:* :math:`(N,E)`, weight and bias, as views: they stay when ZeRO 3
        empties the Parameters after the forward."""
        source = self.flat_source().views()
        return source.x, source.weight, source.bias


class _Values(torch.autograd.Function):
    """The values of a :class:`TokenFunction`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: Sequence[TiledHead],
        function: TokenFunction,
        *constants: Tensor | None,
    ) -> Tensor:
        """``constants`` are hidden states, weight and bias of the teacher, if there is one, and the
        tensors of ``function``."""
        inputs = x, weight, bias, *constants
        sides = _sides(heads, inputs)
        found = [
            evaluate(sides, function.of_tokens(tokens), tokens)
            for tokens in chunks(0, len(x), tokens_of_tile(heads[0].tiling))
        ]
        values = torch.cat([values for values, _ in found])
        saved = [torch.cat(numbers) for numbers in zip(*(s for _, s in found), strict=True)]
        ctx.save_for_backward(*inputs, *saved)
        ctx.context = heads, function, len(inputs)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_once(grad)
        heads, function, num_inputs = ctx.context
        tensors = ctx.saved_tensors  # Read once: checkpointing unpacks them only once.
        inputs, saved = tensors[:num_inputs], tensors[num_inputs:]
        function = function.with_tensors(*inputs[3 * len(heads) :])
        sides = _sides(heads, inputs)
        gradients = _gradients(sides[0], inputs, ctx.needs_input_grad)
        differentiate(sides, function, slice(0, len(grad)), saved, grad, gradients)
        return *_cast(gradients, inputs), *[None] * (len(ctx.needs_input_grad) - 3)


class _Loss(torch.autograd.Function):
    """The sum of the losses of tokens divided by ``divisor``. The forward computes the gradients.

    The memory of the weight's gradient holds the logits of the first tokens until they are needed
    again. If it is fp32 (or fp64), it then accumulates the gradients of the other tokens, a chunk
    of tokens at a time; else their logits are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: TiledHead,
        function: TokenLosses,
        divisor: Tensor,
        accum_dtype: torch.dtype | None,
        with_gradients: bool,
    ) -> Tensor:
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        side = Tiles(head, x, weight, bias)
        gradients = Gradients(side, x, weight, needs, accum_dtype or weight.dtype)
        # fp16 can't hold small gradients that are not yet multiplied by the loss scale, so the
        # backward divides them.
        ctx.later = divisor if side.dtype == torch.float16 else None
        unit = torch.ones_like(divisor) if ctx.later is not None else divisor
        grad = unit.to(side.wide).reciprocal().expand(len(x), 1)
        total = x.new_zeros((), dtype=torch.float64)
        for tokens, kept in _groups(side, gradients, any(needs)):
            of_tokens = function.of_tokens(tokens)
            values, saved = evaluate([side], of_tokens, tokens, kept)
            total += values.double().sum()
            if any(needs):
                differentiate([side], of_tokens, tokens, saved, grad[tokens], gradients, kept)
        if any(needs):
            ctx.save_for_backward(*gradients.results())
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return (total / divisor).to(side.wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_once(grad)
        factor = grad if ctx.later is None else (grad / ctx.later).to(grad.dtype)
        grads = [
            None if gradient is None else scaled(gradient, factor, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 5


def _groups(
    side: Tiles, gradients: Gradients, with_gradients: bool
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Splits the tokens, and yields memory for the logits of the first of them, by tiles. None of
    it depends on the gang."""
    tiling, num_tokens = side.tiling, len(side.x)
    if not with_gradients:
        yield from ((tokens, []) for tokens in chunks(0, num_tokens, tokens_of_tile(tiling)))
        return
    start = 0
    if (dtype := gradients.dtype) is not None:
        fits = tiling.width * dtype.itemsize % side.wide.itemsize == 0
        count = min(tiling.width * dtype.itemsize // side.wide.itemsize, num_tokens) if fits else 0
        kept = [tile.view(side.wide)[:, :count] for tile in gradients.tiles] if count else []
        if dtype != side.wide:
            yield slice(0, num_tokens), kept
            return
        if count >= min(MIN_TOKENS, num_tokens):
            yield slice(0, count), kept
            start = count
    step = min(most_tokens(num_tokens, tiling), num_tokens - start)
    memory = side.x.new_empty(len(tiling.rows), step, dtype=side.wide)
    parts = memory.split([len(classes) for classes in tiling.classes])
    for tokens in chunks(start, num_tokens, step):
        yield tokens, [part[:, : tokens.stop - tokens.start] for part in parts]


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, head: TiledHead, k: int
    ) -> tuple[Tensor, Tensor]:
        tiling, num_classes = head.tiling, head.tiling.num_classes
        side, found = Tiles(head, x, weight, bias), []
        largest = max(len(tiling.rows_of(rank)) for rank in range(tiling.gang.size))
        shape = Partition(
            num_classes, max(1, num_classes // largest)
        )  # Of blocks at least as large.
        for tokens in chunks(0, len(x), most_tokens(len(x), tiling)):
            z = side.all_logits(tokens)
            found.append(local_top_k(z, k, tiling.rows, shape, in_place=True))
        values, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        values, ids = merged_top_k(values, ids, k, tiling.gang)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(x, weight, bias, values, ids)
        ctx.head = head
        return values, ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _check_once(grad)
        *inputs, values, ids = ctx.saved_tensors
        function, slope = Chosen(ids), ctx.head.head.slope(values)
        grad = grad if slope is None else grad * slope
        side = Tiles(ctx.head, *inputs)
        gradients = _gradients(side, inputs, ctx.needs_input_grad)

        def gradient_of(tile: int, classes: range) -> Tensor:
            z = grad.new_empty(len(classes), len(grad))
            function.scatter(z, classes, grad)
            return z

        gradients.add(slice(0, len(grad)), grad.abs().sum(-1), gradient_of)
        return *_cast(gradients, inputs), None, None


class _Logits(torch.autograd.Function):
    """All logits, without a soft cap. *Shape:* :math:`(N,V)`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: TiledHead,
        dtype: torch.dtype,
    ) -> Tensor:
        side, tiling = Tiles(head, x, weight, bias), head.tiling
        sizes = [len(tiling.rows_of(rank)) for rank in range(tiling.gang.size)]
        output = x.new_empty(len(x), tiling.num_classes, dtype=dtype)
        for tokens in chunks(0, len(x), most_tokens(len(x), tiling)):
            own = side.all_logits(tokens).to(dtype)
            every = own.new_empty(tiling.num_classes, own.size(1))
            tiling.gang.all_gather(every, own, sizes)
            output[tokens] = every.T
        ctx.save_for_backward(x, weight, bias)
        ctx.head = head
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_once(grad)
        inputs = ctx.saved_tensors
        side = Tiles(ctx.head, *inputs)
        gradients = _gradients(side, inputs, ctx.needs_input_grad)

        def gradient_of(tile: int, classes: range) -> Tensor:
            columns = grad[:, classes.start : classes.stop]
            return columns.T.to(side.wide, memory_format=torch.contiguous_format)

        bound = torch.linalg.vector_norm(grad, 1, dim=-1, dtype=torch.float64)
        gradients.add(slice(0, len(grad)), bound, gradient_of)
        return *_cast(gradients, inputs), None, None


def tiled_loss(
    projection: TiledProjection,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    *,
    scale: float = 1.0,
    accum_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Computes :meth:`tp_embed.OutputHead.loss`.

    :param options: of :class:`LossOptions`.
    """
    check_reduction(projection.x.shape[:-1], target, reduction)
    check_accum_dtype(accum_dtype)
    projection, settings = replace(projection, scale=scale), LossOptions(**options)
    if reduction == "none":
        return token_losses(projection, target, class_weight, settings)
    projection.check()
    settings.check()
    classes = projection.classes
    target = check_target(target, settings.ignore_index, classes)
    function = TokenLosses(target[:, None], class_weight, settings, classes.size)
    function.check()
    _check_plain(projection.x)
    with unguarded():
        x, weight, bias = projection.tensors()
    kept = target != settings.ignore_index
    total = kept.new_ones((), dtype=torch.float64)
    if reduction == "mean":
        total = weights_of_targets(target, class_weight, settings, torch.float64).sum()
    nan = total.new_zeros(()).masked_fill(total == 0, torch.nan)
    total = total.masked_fill(total == 0, 1.0)
    if x.device.type == "cpu" and not kept.all():
        index = kept.nonzero()[:, 0]
        x, function = x.index_select(0, index), replace(function, target=target[index, None])
    inputs = x, weight, bias, projection.tiled_head(), function
    with without_autocast(x), unguarded():
        loss: Tensor = _Loss.apply(*inputs, total, accum_dtype, torch.is_grad_enabled())
    return loss + nan.to(loss.dtype)


def tiled_top_k(projection: TiledProjection, k: int) -> tuple[Tensor, Tensor]:
    """Computes :func:`tp_embed.nn.token_values.top_k`."""
    projection.check()
    check_k(k, projection.classes)
    _check_plain(projection.x)
    head = projection.tiled_head()
    with without_autocast(projection.x), unguarded():
        values, ids = _TopK.apply(*projection.tensors(), head, k)
    tokens = projection.x.shape[:-1]
    return values.view(*tokens, k), ids.view(*tokens, k)


def tiled_logits(projection: TiledProjection) -> Tensor:
    """Computes the logits, without a soft cap. *Shape:* :math:`(*,V)`."""
    _check_plain(projection.x)
    dtype, head = product_dtypes(projection.x, projection.weight)[0], projection.tiled_head()
    with without_autocast(projection.x), unguarded():
        logits: Tensor = _Logits.apply(*projection.tensors(), head, dtype)
    return logits.view(*projection.x.shape[:-1], projection.classes.size)


def _gradients(side: Tiles, inputs: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    x, weight, *_ = inputs
    return Gradients(side, x, weight, needs[:3], weight.dtype)


def _cast(gradients: Gradients, inputs: Sequence[Any]) -> list[Tensor | None]:
    pairs = zip(gradients.results(), inputs[:3], strict=True)
    return [None if found is None else found.to(like.dtype) for found, like in pairs]


def _sides(heads: Sequence[TiledHead], inputs: Sequence[Any]) -> list[Tiles]:
    return [Tiles(head, *inputs[3 * i : 3 * i + 3]) for i, head in enumerate(heads)]


def _check_plain(x: Tensor) -> None:
    if is_transformed() or in_graph(x):
        _refuse("transforms of `torch.func`, graphs, and tensors without values")


def _check_once(grad: Tensor) -> None:
    if torch.is_grad_enabled() or is_batched(grad):
        _refuse("derivatives of gradients (`create_graph=True`), and several at once")


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"`deterministic` must be None for {what}, but is 'topology' instead. Make the head "
        "without it, or set `head.deterministic = None`."
    )
