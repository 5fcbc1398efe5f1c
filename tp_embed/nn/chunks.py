"""Logits of an output head for a chunk of tokens at a time, and the gradients of its inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.nn.functional import linear

from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.collectives import reduce_partial
from tp_embed.nn.projection import add_gradients, compute_logits, product_dtypes, row_blocks
from tp_embed.nn.token_loss import check_soft_cap, widened
from tp_embed.parameter.sharded import unguarded
from tp_embed.partition import Partition

# The least memory for logits: with less, products are slower.
_CHUNK_BYTES = 8 << 20

_ALONE: Gang = FakeGang("cpu")  # Size 1: sends nothing.


class Head(NamedTuple):
    """An output head without its tensors.

    :param width: the size of whole hidden states.
    :param dtype: the dtype of products.
    """

    sum_over: Gang
    gang: Gang
    classes: Partition
    width: int
    soft_cap: float | None
    temperature: float
    dtype: torch.dtype

    @property
    def own(self) -> range:
        return self.classes.shard(self.gang.rank)

    def cap(self, logits: Tensor) -> None:
        """Caps logits and divides them by the temperature, in place."""
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.temperature != 1.0:
            logits.div_(self.temperature)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Returns the slope of the cap, from logits that :meth:`cap` returned."""
        if self.soft_cap is None:
            return None
        factor = self.temperature / self.soft_cap
        return torch.addcmul(logits.new_ones(()), logits, logits, value=-(factor**2))


class Source(NamedTuple):
    """A head and its tensors: x, *Shape:* :math:`(N,E)`, weight and bias."""

    head: Head
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def views(self) -> Source:
        """Returns views of the tensors."""
        bias = None if self.bias is None else self.bias.view_as(self.bias)
        return self._replace(
            x=self.x.view_as(self.x), weight=self.weight.view_as(self.weight), bias=bias
        )

    def narrowed(self) -> Source:
        if self.head.dtype.itemsize < self.weight.itemsize:
            # For autocast; casts to a wider dtype are done per block.
            return self._replace(weight=self.weight.to(self.head.dtype))
        return self

    def chunk(self, tokens: slice) -> Tensor:
        return self.x[tokens].to(self.head.dtype)

    def of_block(self, rows: slice) -> Source:
        """Returns a head with these rows of the weight only."""
        bias = None if self.bias is None else self.bias[rows]
        return self._replace(weight=self.weight[rows], bias=bias)

    def compute(self, tokens: slice, out: Tensor) -> None:
        """Puts the logits of ``tokens`` into ``out``, *Shape:* :math:`(V_{rank},n)`."""
        compute_logits(
            out,
            self.chunk(tokens),
            self.weight,
            self.bias,
            row_blocks(self.weight),
            self.head.sum_over,
        )

    def compose(self) -> Tensor:
        """Computes all logits, *Shape:* :math:`(V_{rank},N)`, with differentiable operations."""
        head = self.head
        with without_autocast(self.x), unguarded():
            weight = widened(self.weight.to(head.dtype))
            logits = linear(widened(self.x.to(head.dtype)), weight)
            logits = reduce_partial(logits, head.sum_over)
            if self.bias is not None:
                logits = logits + self.bias
            if head.soft_cap is not None:
                logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
            return logits.T / head.temperature


@dataclass(frozen=True)
class Projection(ABC):
    """Hidden states and the output head that projects them to logits.

    :param x: the hidden states. *Shape:* :math:`(*,E)`; for ``shard_dim`` 1 this rank's columns,
        *Shape:* :math:`(*,E_{rank})`. For ``shard_dim`` 0 their gradient is partial: pass them
        through :func:`~tp_embed.gang.collectives.copy_to_gang`.
    :param weight: *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
    :param bias: *Shape:* :math:`(V_{rank})` or, for ``shard_dim`` 1, :math:`(V)`.
    :param partition: the partition of V, or E, over the gang.
    :param soft_cap: :math:`c`, which turns each logit :math:`l` into :math:`c \\tanh(l/c)`.
    :param temperature: divides the logits, after the cap.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gang: Gang
    partition: Partition
    shard_dim: int = 0
    soft_cap: float | None = None
    temperature: float = 1.0

    def check(self) -> None:
        """
        :raises TypeError: ``temperature`` is not a number.
        :raises ValueError: ``temperature`` or ``soft_cap`` is not positive.
        """
        check_soft_cap(self.soft_cap)
        if not isinstance(self.temperature, (int, float)):
            raise TypeError(
                f"`temperature` must be a number, but is a `{type(self.temperature).__name__}` "
                "instead. Pass `float(temperature)`; it gets no gradient."
            )
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, but is {self.temperature} instead.")

    @abstractmethod
    def values(self, function: Any, *teachers: Projection) -> Tensor:
        """Returns the values of a :class:`~tp_embed.nn.token_functions.TokenFunction`, *Shape:*
        :math:`(N)` or :math:`(N,K)`."""

    def scaled(self, scale: float) -> Self:
        """Returns a projection whose logits are multiplied by ``scale``, before the cap. Rounds
        nothing: with l the logits, c tanh(scale l / c) = scale (c / scale) tanh(l / (c / scale)).

        :raises ValueError: ``scale`` is 0.
        """
        if scale == 0:
            raise ValueError(
                "`scale` must not be 0 for a loss with `weight` or `reduction='none'`, but is "
                "0 instead. Without a scale, pass 1.0."
            )
        x, bias, cap = self.x, self.bias, self.soft_cap
        if scale < 0:
            x, bias = -x, None if bias is None else -bias
        scale = abs(scale)
        cap = None if cap is None else cap / scale
        temperature = self.temperature / scale
        return replace(self, x=x, bias=bias, soft_cap=cap, temperature=temperature)

    @property
    def classes(self) -> Partition:
        """The partition of the classes whose logits each rank gets."""
        return Partition(self.weight.size(0), 1) if self.shard_dim else self.partition

    def flat_source(self) -> Source:
        x = self.x.reshape(self.x.shape[:-1].numel(), self.x.size(-1))
        return Source(self.head(), x, self.weight, self.bias)

    def head(self) -> Head:
        sum_over, gang = (self.gang, _ALONE) if self.shard_dim else (_ALONE, self.gang)
        width = self.partition.size if self.shard_dim else self.x.size(-1)
        _, dtype = product_dtypes(self.x, self.weight)
        shape = gang, self.classes, width
        return Head(sum_over, *shape, self.soft_cap, self.temperature, dtype)


def _sum_dtype(sources: Sequence[Source]) -> torch.dtype:
    dtype = torch.float32
    for source in sources:
        dtype = torch.promote_types(dtype, source.head.dtype)
    return dtype


def _most_logits(sources: Sequence[Source]) -> int:
    """Returns how many logits of each source are held at a time."""
    head, x = sources[0].head, sources[0].x
    return max(_CHUNK_BYTES // 4, len(x) * head.width) // len(sources)


def chunks_of(
    sources: Sequence[Source], *, tokens_first: bool = False
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields chunks of tokens, with memory for their logits by each of ``sources``, *Shape:*
    :math:`(V_{rank},n)`."""
    head, x = sources[0].head, sources[0].x
    # Use the largest shard, so that all ranks get the same chunks.
    most = _most_logits(sources) // max(1, head.classes.block)
    num_chunks = -(-len(x) // max(1, most))
    tokens, rows = -(-len(x) // max(1, num_chunks)), len(head.own)
    memory = x.new_empty(len(sources), tokens * rows, dtype=_sum_dtype(sources))
    for start in range(0, max(1, len(x)), max(1, tokens)):  # At least one, maybe empty.
        chosen = slice(start, min(start + tokens, len(x)))
        length = chosen.stop - start
        used = memory[:, : rows * length]
        if tokens_first:
            yield chosen, list(used.view(len(sources), length, rows).mT)
        else:
            # So that products transpose only the tokens, which are fewer.
            yield chosen, list(used.view(len(sources), rows, length))


def class_blocks_of(sources: Sequence[Source]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields blocks of rows of the weights, with memory for the logits of all tokens by each of
    ``sources``, *Shape:* :math:`(V_{block},N)`."""
    x, rows = sources[0].x, len(sources[0].weight)
    step = min(rows, max(1, _most_logits(sources) // max(1, len(x))))
    memory = x.new_empty(len(sources), step, len(x), dtype=_sum_dtype(sources))
    for start in range(0, rows, max(1, step)):
        block = slice(start, min(start + step, rows))
        yield block, list(memory[:, : block.stop - start])


class Gradients:
    """The gradients of hidden states, weight and bias, from blocks of the gradient of the logits.
    Each block completes its rows of the gradient of the weight.

    ``grad`` is the gradient of the values divided by ``unit``, so that its products in fp16 neither
    overflow nor vanish, whatever the loss scale.
    """

    def __init__(self, source: Source, needs: Sequence[bool], grad: Tensor) -> None:
        self.source, self.dtype = source._replace(x=source.chunk(slice(None))), source.x.dtype
        self.unit = _unit(grad) if source.head.dtype == torch.float16 else None
        self.grad = grad if self.unit is None else grad / self.unit
        self.x = torch.zeros_like(source.x, dtype=grad.dtype) if needs[0] else None
        self.weight = torch.empty_like(source.weight) if needs[1] else None
        self.bias = None
        if needs[2] and source.bias is not None:
            self.bias = torch.empty_like(source.bias)

    def add(self, rows: slice, logits: Tensor) -> None:
        """Adds the gradients of a block, from the gradient of its logits in ``logits``."""
        if self.bias is not None:
            self.bias[rows] = self._scaled(logits.sum(1))
        if self.x is None and self.weight is None:
            return
        weight, sums = self.source.weight[rows], None
        if self.weight is not None:
            sums = self.weight[rows].zero_()
            if sums.dtype != logits.dtype:
                sums = torch.zeros_like(sums, dtype=logits.dtype)
        add_gradients(logits, self.source.x, weight, row_blocks(weight), self.x, sums)
        if self.weight is not None and sums is not None:
            sums = self._scaled(sums)
            if sums.dtype != self.weight.dtype:
                self.weight[rows] = sums

    def results(self) -> tuple[Tensor | None, ...]:
        x = None if self.x is None else self._scaled(self.x).to(self.dtype)
        return x, self.weight, self.bias

    def _scaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.unit is None else gradient.mul_(self.unit)


def _unit(grad: Tensor) -> Tensor:
    """Returns the factor that makes the largest item 1024, near the middle of fp16's range."""
    largest = grad.abs().amax() if grad.numel() else grad.new_zeros(())
    return torch.where(largest > 0, largest / 1024, 1.0)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Computes in the dtypes of the operands, on the device of ``x``. Does nothing if autocast is
    off: some devices claim to support it and do not."""
    device = x.device.type
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
