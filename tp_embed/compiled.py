"""What is sent, as operators of a graph of :func:`torch.compile`.

A lookup is one operator. What it does, collectives and errors included, is what the layer does
without a graph. The graph knows of it the shape of the output, which depends on that of the ids
only. A graph holds tensors and numbers, so tables and gangs are named in it by numbers, their
handles.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, library
from torch._library.effects import EffectType


class Table(Protocol):
    """What the operators call, both without autograd."""

    def rows_in_graph(self, weight: Tensor, ids: Tensor, real: Tensor | None) -> Tensor: ...

    def gradient_in_graph(self, grad: Tensor, ids: Tensor, real: Tensor | None) -> Tensor: ...


class _Gang(Protocol):
    def all_gather(self, output: Tensor, input: Tensor) -> None: ...

    def all_reduce(self, tensor: Tensor) -> None: ...


_NAMED: WeakValueDictionary[int, Any] = WeakValueDictionary()
_HANDLES = count()


def register(named: Table | _Gang) -> int:
    """A handle that nothing else in this process has had. It keeps nothing alive."""
    handle = next(_HANDLES)
    _NAMED[handle] = named
    return handle


@library.custom_op("tp_embed::look_up", mutates_args=())
def look_up(
    weight: Tensor, ids: Tensor, real: Tensor | None, shape: Sequence[int], handle: int
) -> Tensor:
    """The rows that this rank wants of the table of ``handle``, with their gradient.

    :param real: what is no padding; if ``None``, all. *Shape:* that of ``ids``.
    :param shape: that of the output.
    """
    table: Table = _NAMED[handle]
    return table.rows_in_graph(weight, ids, real)


@library.custom_op("tp_embed::look_up_backward", mutates_args=())
def _look_up_backward(
    grad: Tensor, ids: Tensor, real: Tensor | None, shape: Sequence[int], handle: int
) -> Tensor:
    """The gradient of this rank's block, which has ``shape``, for that of the rows."""
    table: Table = _NAMED[handle]
    return table.gradient_in_graph(grad, ids, real)


@library.custom_op("tp_embed::all_gather", mutates_args=())
def all_gather(x: Tensor, size: int, handle: int) -> Tensor:
    """The ``x`` of all ranks of the gang of ``handle``, which has ``size`` of them. *Shape:*
    :math:`(P,*)`."""
    gang: _Gang = _NAMED[handle]
    output = x.new_empty((size, *x.shape))
    gang.all_gather(output, x)
    return output


@library.custom_op("tp_embed::all_reduce", mutates_args=())
def all_reduce(x: Tensor, handle: int) -> Tensor:
    """The sum of the ``x`` of all ranks of the gang of ``handle``."""
    gang: _Gang = _NAMED[handle]
    output = x.clone(memory_format=torch.contiguous_format)
    gang.all_reduce(output)
    return output


def _empty(
    like: Tensor, ids: Tensor, real: Tensor | None, shape: Sequence[int], handle: int
) -> Tensor:
    return like.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, real, _, ctx.handle = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(ids, real)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = _look_up_backward(grad, *ctx.saved_tensors, ctx.shape, ctx.handle)
    return gradient, None, None, None, None


look_up.register_autograd(_backward, setup_context=_keep)
look_up.register_fake(_empty)
_look_up_backward.register_fake(_empty)
all_gather.register_fake(lambda x, size, handle: x.new_empty((size, *x.shape)))
all_reduce.register_fake(
    lambda x, handle: torch.empty_like(x, memory_format=torch.contiguous_format)
)
for _operator in (look_up, _look_up_backward, all_gather, all_reduce):
    # Ranks have to meet in the same order, but each compiles for shapes of its own.
    _operator.register_effect(EffectType.ORDERED)
