"""Custom operators that communicate, for graphs of :func:`torch.compile`.

A lookup is one operator. It does the same as the layer without a graph, including collectives and
errors. The graph only knows the shape of its output, which depends only on the shape of the ids.
Since a graph holds only tensors and numbers, it refers to tables and gangs by numbers, their
handles.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, library

from tp_embed._torch_private import DispatchModeKey, EffectType, FakeTensor, get_dispatch_mode


class Table(Protocol):
    """The interface of a table for the operators; all methods run without autograd."""

    def rows_in_graph(self, weight: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor: ...

    def gradient_in_graph(self, grad: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor: ...

    def transposed(self, block: Tensor) -> Tensor: ...


class _Gang(Protocol):
    def all_gather(self, output: Tensor, input: Tensor) -> None: ...

    def all_reduce(self, tensor: Tensor) -> None: ...

    def reduce_scatter(self, output: Tensor, input: Tensor) -> None: ...

    def all_to_all(self, output: Tensor, input: Tensor) -> None: ...


_NAMED: WeakValueDictionary[int, Any] = WeakValueDictionary()
_HANDLES = count()


def register(named: Table | _Gang) -> int:
    """Returns a new handle for ``named``, unique in this process. Doesn't keep it alive."""
    handle = next(_HANDLES)
    _NAMED[handle] = named
    return handle


def is_traced(*tensors: Tensor) -> bool:
    """Returns whether a graph is being traced, by torch.compile, torch.export or ``make_fx``, or
    tensors are fake. Then values can't be read, and lookups must be operators.

    :raises TypeError: ``make_fx`` traces shards that are not inputs.
    """
    if not torch.compiler.is_compiling() and _is_on(DispatchModeKey.PROXY):
        _check_inputs(tensors)
    return is_recorded(*tensors)


def is_recorded(*tensors: Tensor) -> bool:
    """:func:`is_traced` without the check of the tensors."""
    return (
        torch.compiler.is_compiling()
        or any(isinstance(x, FakeTensor) for x in tensors)
        or _is_on(DispatchModeKey.PROXY)
        or _is_on(DispatchModeKey.FAKE)
    )


def _is_on(mode: Any) -> bool:
    return get_dispatch_mode(mode) is not None


def _check_inputs(tensors: Sequence[Tensor]) -> None:
    kinds = {type(x).__name__ for x in tensors} - {"Tensor", "Parameter", "FakeTensor"}
    if kinds:
        raise TypeError(
            f"`make_fx` must be given the weights of sharded tables as inputs, but records a "
            f"`{kinds.pop()}`. Trace `lambda weights, ids: torch.func.functional_call(model, "
            "weights, ids)` with `weight.to_local()` of each, or use `torch.export`."
        )


def _find(handle: int) -> Any:
    """
    :raises RuntimeError: the table or gang of the handle no longer exists.
    """
    found = _NAMED.get(handle)
    if found is None:
        raise RuntimeError(
            f"A compiled graph calls the table or gang number {handle} of this process, which is "
            "gone: a graph keeps neither alive, and works only in the process that traced it. Keep "
            "the module as long as its graph is called, and compile or export it again after it is "
            "copied or loaded."
        )
    return found


def _table(handle: int) -> Table:
    table: Table = _find(handle)
    return table


@library.custom_op("tp_embed::look_up", mutates_args=())
def look_up(
    weight: Tensor, ids: Tensor, valid: Tensor | None, shape: Sequence[int], handle: int
) -> Tensor:
    """Looks up the rows this rank needs from the table of ``handle``, with autograd.

    :param valid: false at padding; ``None`` for no padding. *Shape:* as ``ids``.
    :param shape: the shape of the output.
    """
    return _table(handle).rows_in_graph(weight, ids, valid)


@library.custom_op("tp_embed::look_up_backward", mutates_args=())
def _look_up_backward(
    grad: Tensor, ids: Tensor, valid: Tensor | None, shape: Sequence[int], handle: int
) -> Tensor:
    """Computes the gradient of this rank's block, of shape ``shape``, from the gradient of rows."""
    return _table(handle).gradient_in_graph(grad, ids, valid)


@library.custom_op("tp_embed::all_gather", mutates_args=())
def all_gather(x: Tensor, size: int, handle: int) -> Tensor:
    """Stacks ``x`` of all ranks of the gang of ``handle``, which has ``size`` ranks. *Shape:*
    :math:`(P,*)`."""
    gang: _Gang = _find(handle)
    output = x.new_empty((size, *x.shape))
    gang.all_gather(output, x)
    return output


@library.custom_op("tp_embed::all_reduce", mutates_args=())
def all_reduce(x: Tensor, handle: int) -> Tensor:
    """Sums ``x`` over all ranks of the gang of ``handle``."""
    gang: _Gang = _find(handle)
    output = x.clone(memory_format=torch.contiguous_format)
    gang.all_reduce(output)
    return output


@library.custom_op("tp_embed::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, handle: int) -> Tensor:
    """Sums the block of this rank over all ranks of the gang of ``handle``.

    :param x: a block for each rank. *Shape:* :math:`(P,*)`.
    """
    gang: _Gang = _find(handle)
    output = x.new_empty(x.shape[1:])
    gang.reduce_scatter(output, x)
    return output


@library.custom_op("tp_embed::all_to_all", mutates_args=())
def all_to_all(x: Tensor, handle: int) -> Tensor:
    """Sends block r of ``x`` to rank r of the gang of ``handle``, and stacks what each sends.

    :param x: *Shape:* :math:`(P,*)`.
    """
    gang: _Gang = _find(handle)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    gang.all_to_all(output, x)
    return output


def _empty(
    like: Tensor, ids: Tensor, valid: Tensor | None, shape: Sequence[int], handle: int
) -> Tensor:
    return like.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, valid, _, ctx.handle = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(ids, valid)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = _look_up_backward(grad, *ctx.saved_tensors, ctx.shape, ctx.handle)
    return gradient, None, None, None, None


def _save_for_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, ids, valid, _, ctx.handle = inputs
    ctx.shape = grad.shape
    ctx.save_for_backward(ids, valid)


def _backward_to_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table = _table(ctx.handle)
    rows = look_up(table.transposed(grad), *ctx.saved_tensors, ctx.shape, ctx.handle)
    return rows, None, None, None, None


look_up.register_autograd(_backward, setup_context=_save)
_look_up_backward.register_autograd(_backward_to_rows, setup_context=_save_for_rows)
look_up.register_fake(_empty)
_look_up_backward.register_fake(_empty)
all_gather.register_fake(lambda x, size, handle: x.new_empty((size, *x.shape)))
reduce_scatter.register_fake(lambda x, handle: x.new_empty(x.shape[1:]))
for _like in (all_reduce, all_to_all):
    _like.register_fake(
        lambda x, handle: torch.empty_like(x, memory_format=torch.contiguous_format)
    )
_COLLECTIVES = all_gather, all_reduce, reduce_scatter, all_to_all
for _operator in (look_up, _look_up_backward, *_COLLECTIVES):
    # Ranks must run collectives in the same order, but each compiles its own graph.
    _operator.register_effect(EffectType.ORDERED)
