"""Functions of the logits of an output head, a tile of classes at a time. Values and gradients have
the same bits at every size of the gang."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tp_embed.gang import FakeGang, Gang
from tp_embed.nn.chunks import Head
from tp_embed.nn.projection import compute_logits, logits_operand, multiply
from tp_embed.nn.tiles import ExactSums, Tiling, aligned, is_aligned, largest_item
from tp_embed.nn.token_functions import TokenFunction

_ALONE: Gang = FakeGang("cpu")  # Size 1: sends nothing.

# The most logits of a tile, and the most of a rank, that are held at once where there is a choice.
_TILE_ITEMS = 1 << 21
_CHUNK_ITEMS = 1 << 23

# Products of fewer tokens are slow.
MIN_TOKENS = 128


class TiledHead(NamedTuple):
    """An output head without its tensors.

    :param scale: multiplies logits, before the soft cap.
    """

    head: Head
    tiling: Tiling
    scale: float = 1.0


class Tiles:
    """An output head, hidden states, and the tiles of the head that this rank computes.

    Collective: all ranks must make it. Sends what :meth:`Tiling.fetch` does.

    :param x: *Shape:* :math:`(N,E)`.
    :param weight: this rank's shard.
    :param bias: *Shape:* :math:`(V)`.
    """

    def __init__(self, head: TiledHead, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        (self.head, self.tiling, self.scale), self.bias = head, bias
        self.dtype = self.head.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.x = aligned(x.to(self.dtype))
        self._operand = aligned(logits_operand(self.x, self.wide))
        self.weights = self.tiling.fetch(weight)

    def weight(self, tile: int) -> Tensor:
        return self.weights[tile].to(self.dtype)

    def logits(self, tile: int, tokens: slice, out: Tensor | None = None) -> Tensor:
        """Computes logits, *Shape:* :math:`(T,n)`. *Dtype:* fp32 or fp64."""
        weight, chunk = self.weight(tile), self._operand[tokens]
        if out is None:
            out = chunk.new_empty(len(weight), len(chunk), dtype=self.wide)
        classes = self.tiling.classes[tile]
        bias = None if self.bias is None else self.bias[classes.start : classes.stop]
        compute_logits(out, chunk, weight, bias, [slice(None)], _ALONE)
        if self.scale != 1.0:
            out.mul_(self.scale)
        self.head.cap(out)
        return out

    def all_logits(self, tokens: slice) -> Tensor:
        """Computes the logits of all tiles of this rank, *Shape:* :math:`(V_{tiles},n)`."""
        classes = self.tiling.classes
        count = tokens.stop - tokens.start
        output = self.x.new_empty(len(self.tiling.rows), count, dtype=self.wide)
        for tile, rows in enumerate(output.split([len(part) for part in classes])):
            rows.copy_(self.logits(tile, tokens))
        return output


def evaluate(
    sides: Sequence[Tiles], function: TokenFunction, tokens: slice, kept: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Computes the values of ``tokens``, and what their gradients need.

    Does one all-gather of C numbers per token and tile, for C numbers of a summary.

    :param function: of these tokens.
    :param kept: for each tile, memory for the logits of the first tokens. *Shape:* :math:`(T,k)`.
    """
    tiling, wide = sides[0].tiling, sides[0].wide
    parts = []
    for tile, classes in enumerate(tiling.classes):
        logits = [side.logits(tile, tokens) for side in sides]
        if kept:
            kept[tile].copy_(logits[0][:, : kept[tile].size(1)])
        parts.append(function.summarize(logits, classes))
    if not parts:  # For the number of numbers.
        nothing = sides[0].x.new_empty(0, tokens.stop - tokens.start, dtype=wide)
        parts = [function.summarize([nothing] * len(sides), range(0))[None][:0]]
    own = torch.stack(parts) if tiling.classes else parts[0]
    every = own
    if tiling.gang.size > 1:
        every = own.new_empty(tiling.num_tiles, *own.shape[1:])
        tiling.gang.all_gather(every, own, tiling.sizes)
    values, saved = function.combine(every.double())
    return values.to(wide), [number.to(wide) for number in saved]


def differentiate(
    sides: Sequence[Tiles],
    function: TokenFunction,
    tokens: slice,
    saved: Sequence[Tensor],
    grad: Tensor,
    gradients: Gradients,
    kept: Sequence[Tensor] = (),
) -> None:
    """Adds the gradients of ``tokens``, from the gradient of their values.

    :param kept: as :func:`evaluate` left it.
    """
    first = sides[0]
    grad = grad * (first.scale / first.head.temperature)

    def gradient_of(tile: int, classes: range) -> Tensor:
        logits = [_again(first, tile, tokens, kept)]
        logits += [side.logits(tile, tokens) for side in sides[1:]]
        slope = first.head.slope(logits[0])
        function.differentiate(logits, classes, saved, grad)
        return logits[0] if slope is None else logits[0].mul_(slope)

    gradients.add(tokens, function.bound(saved, grad), gradient_of)


def _again(side: Tiles, tile: int, tokens: slice, kept: Sequence[Tensor]) -> Tensor:
    """Returns the logits of a tile: those that were kept, and the others computed again."""
    count = kept[tile].size(1) if kept else 0
    if count == 0:
        return side.logits(tile, tokens)
    logits = side.x.new_empty(len(kept[tile]), tokens.stop - tokens.start, dtype=side.wide)
    logits[:, :count] = kept[tile]
    if count < logits.size(1):
        side.logits(tile, slice(tokens.start + count, tokens.stop), logits[:, count:])
    return logits


class Gradients:
    """Backpropagates gradients of logits to hidden states, weight and bias.

    :param weight: this rank's shard.
    :param dtype: of the gradient of the weight.
    """

    def __init__(
        self, side: Tiles, x: Tensor, weight: Tensor, needs: Sequence[bool], dtype: torch.dtype
    ) -> None:
        self._side, self._gang = side, side.tiling.gang
        # fp16 can't hold small gradients, nor large sums.
        self._low = side.wide if side.dtype == torch.float16 else side.dtype
        self._x = torch.zeros_like(x) if needs[0] else None
        self._largest = largest_item(weight, self._gang) if needs[0] else None
        self._memory: Tensor | None = None
        self.tiles: list[Tensor] = []
        if needs[1]:
            dtype = dtype if dtype == self._low else side.wide
            self._memory, self.tiles = side.tiling.new_gradient(weight, dtype)
            if not len(x):
                for tile in (self._memory, *self.tiles):
                    tile.zero_()
        self._bias = None
        if needs[2] and side.bias is not None:
            self._bias = torch.zeros_like(side.bias, dtype=side.wide)

    def add(
        self, tokens: slice, bound: Tensor, gradient_of: Callable[[int, range], Tensor]
    ) -> None:
        """Adds the gradients of ``tokens``; the first ones come first.

        :param bound: at least the sum of the absolute values of the gradients of a token's logits.
            *Shape:* :math:`(n)`.
        :param gradient_of: returns the gradient of the logits of a tile. *Shape:* :math:`(T,n)`.
        """
        side, sums = self._side, None
        chunk = side.x[tokens].to(self._low)
        if self._largest is not None:
            sums = ExactSums(bound.double() * self._largest, chunk.size(1))
            partial = chunk.new_empty(chunk.shape, dtype=side.wide)
        for tile, classes in enumerate(side.tiling.classes):
            gradient = gradient_of(tile, classes)
            if self._bias is not None:
                self._bias[classes.start : classes.stop] += gradient.sum(1)
            low = gradient.to(self._low)
            if sums is not None:
                multiply(low.T, side.weight(tile).to(self._low), partial)
                sums.add(partial)
            if self.tiles:
                _multiply_into(self.tiles[tile], low, chunk, add=tokens.start > 0)
        if self._x is not None and sums is not None:
            self._x[tokens] = sums.reduce(self._gang).to(self._x.dtype)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the gradient of the weight, if it is needed."""
        return None if self._memory is None else self._memory.dtype

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the whole gradients, except for the weight's: each rank has its shard.

        Sends what :meth:`Tiling.fetch` does, and V numbers for the bias.
        """
        weight = self._memory
        if weight is not None:
            weight = self._side.tiling.give_back(weight, self.tiles)
        if self._bias is not None and self._gang.size > 1:
            self._gang.all_reduce(self._bias)  # Each class has only one term.
        return self._x, weight, self._bias


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """Computes a product in aligned memory."""
    result = out if is_aligned(out) else out.clone(memory_format=torch.contiguous_format)
    multiply(left, right, result, add=add)
    if result is not out:
        out.copy_(result)


def chunks(start: int, stop: int, most: int) -> Iterator[slice]:
    """Splits tokens into chunks of ``most`` tokens, which must not depend on the gang. At least
    one, maybe empty."""
    for first in range(start, max(stop, start + 1), max(1, most)):
        yield slice(first, min(first + most, stop))


def tokens_of_tile(tiling: Tiling) -> int:
    """Returns of how many tokens to hold the logits of a tile."""
    return max(MIN_TOKENS, _TILE_ITEMS // tiling.size)


def most_tokens(num_tokens: int, tiling: Tiling) -> int:
    """Returns of how many tokens to hold all logits of a rank."""
    items = max(_CHUNK_ITEMS, num_tokens * tiling.width)
    return max(MIN_TOKENS, items // max(1, tiling.num_classes))
