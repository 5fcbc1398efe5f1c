"""Logits of this rank's classes, which refuse to be used as the logits of all classes."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tp_embed._torch_private import (
    current_graph_task_id,
    is_batching,
    running_functions,
    tree_leaves,
    tree_map_only,
)
from tp_embed.gang.blocks import in_graph
from tp_embed.nn.local_operations import (
    ELEMENTWISE,
    IN_PLACE,
    PASSED,
    PROPERTIES,
    RULES,
    Call,
    is_partial,
)
from tp_embed.parameter.sharded import unguarded

__all__ = ["LocalLogits", "as_local_logits", "local_values"]

_WHY_OUTSIDE = (
    "Rank-local logits are checked outside of compiled graphs. Leave out `fullgraph=True`, or take "
    "`head.loss(x, target)`."
)
_COLLECTIVES = ("torch._ops.c10d", "torch._ops._c10d_functional")


class LocalLogits(Tensor):
    """What an :class:`~tp_embed.OutputHead` with ``output="shard"`` returns over several ranks. As
    a plain tensor, :func:`torch.softmax` and its like would normalize over this rank's classes
    only, and class 0 would be another one on each rank.

    What treats every class alike returns the same kind, also in tuples: arithmetic, comparisons,
    casts, and slices, views, sums and the like along tokens. All else is refused: what moves,
    selects, joins or reduces the classes, and functions that are not known here.

    - :func:`tp_embed.nn.loss.cross_entropy` takes them.
    - So does an :class:`torch.autograd.Function` that is also given a
      :class:`~torch.distributed.ProcessGroup`, such as vocabulary-parallel losses of DeepSpeed and
      Megatron: to its forward and its backward they are plain tensors.
    - ``logits.as_subclass(torch.Tensor)`` is a plain tensor, for code that combines the values of
      ranks itself.
    - ``sum``, ``amax``, ``amin``, ``all`` and ``any`` over the classes are plain tensors, and warn.

    :func:`torch.compile` leaves them out of graphs. What this cannot see: graphs of
    :func:`torch.export` and ``make_fx``, and what a function of :func:`torch.vmap` returns, which
    are plain tensors, and functions that copy numbers and ask no class, such as ``torch.tensor``.

    :raises ValueError: an operation needs the logits of all classes.
    """

    @classmethod
    @torch.compiler.disable(reason=_WHY_OUTSIDE)  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with unguarded():
            call = _call_of(func, args, kwargs)
            is_kept = call.name not in PASSED and _keeps_classes(call)
            if not is_kept:
                _check_plain(call, func)
            try:
                result = func(*args, **kwargs)
            except RuntimeError as e:
                if call.name in ELEMENTWISE and _has_other_classes(call):
                    raise ValueError(_refusal(call.name)) from e
                raise
            return _marked(result, call) if is_kept else result


def as_local_logits(logits: Tensor) -> Tensor:
    """Returns ``logits`` as :class:`LocalLogits`. Graphs that are not of :func:`torch.compile` get
    a plain tensor."""
    return logits if type(logits) is not Tensor else _marked_outside(logits)


@torch.compiler.disable(reason=_WHY_OUTSIDE)  # type: ignore[untyped-decorator]
def _marked_outside(logits: Tensor) -> Tensor:
    return logits if in_graph(logits) else logits.as_subclass(LocalLogits)


def local_values(logits: Tensor) -> Tensor:
    """Returns ``logits`` as a plain tensor."""
    return _unmarked(logits) if isinstance(logits, LocalLogits) else logits


@torch.compiler.disable(reason=_WHY_OUTSIDE)  # type: ignore[untyped-decorator]
def _unmarked(logits: Tensor) -> Tensor:
    return logits.as_subclass(Tensor)


def _call_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    name = func.__name__
    if name == "__get__" and func.__self__.__name__ in PROPERTIES:
        name = f".{func.__self__.__name__}"
    shape = next((x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, LocalLogits)), ())
    if not args:
        args = tuple(kwargs[key] for key in ("input", "tensors") if key in kwargs)
    return Call(name, len(shape), shape[-1] if shape else 0, args, kwargs)


def _keeps_classes(call: Call) -> bool:
    """Returns whether the classes are whole in the last dimension of each result, if the lengths
    are right."""
    rule = RULES.get(call.name)
    if rule is None or call.kwargs.get("out") is not None:
        return False
    if call.name not in ELEMENTWISE or call.name in IN_PLACE:
        # Not an index, for example, or a value that is written to a plain tensor.
        targets = tree_leaves(call.args[:1])
        if not any(isinstance(target, LocalLogits) for target in targets):
            return False
    return rule(call)


def _check_plain(call: Call, func: Any) -> None:
    """Checks that a function whose results are plain tensors may be given logits of some classes.

    :raises ValueError: it must be given all.
    """
    if call.name == "size" and is_batching():
        _refuse("torch.vmap")
    if call.name in PASSED or getattr(func, "__module__", "") in _COLLECTIVES:
        return
    if not _is_in_parallel_loss():
        if not is_partial(call):
            _refuse(call.name)
        _warn(call.name)


def _is_in_parallel_loss() -> bool:
    """Returns whether an :class:`torch.autograd.Function` runs that was given rank-local logits and
    the group of ranks, or a backward, whose forward was checked."""
    return current_graph_task_id() >= 0 or any(
        any(isinstance(arg, LocalLogits) for arg in args)
        and any(isinstance(arg, ProcessGroup) for arg in args)
        for args in running_functions()
    )


def _has_other_classes(call: Call) -> bool:
    """Returns whether an operand has another number of classes, perhaps all."""
    tensors = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    return any(x.ndim > 0 and x.shape[-1] not in (1, call.num_classes) for x in tensors)


def _marked(result: Any, call: Call) -> Any:
    """Returns ``result`` with its tensors as :class:`LocalLogits`.

    :raises ValueError: a tensor has another length than the classes.
    """

    def mark(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] != (call.num_classes,):
            _refuse(call.name)
        return tensor.as_subclass(LocalLogits) if type(tensor) is Tensor else tensor

    return mark(result) if isinstance(result, Tensor) else tree_map_only(Tensor, mark, result)


def _refuse(name: str) -> NoReturn:
    raise ValueError(_refusal(name))


def _refusal(name: str) -> str:
    name = "indexing of classes" if name in ("__getitem__", "__setitem__") else name.lstrip(".")
    return (
        f"`{name}` must be given the logits of all classes, but is given those of this rank's "
        "instead, of a head with `output='shard'` or a model with `shard_logits`. Take the "
        "functions of hidden states, `head.loss(x, target)`, `log_probs`, `entropy`, `top_k`, or "
        "`tp_embed.nn.loss.cross_entropy()`. For all logits leave out `shard_logits`, or the "
        "labels; for this rank's values on purpose, take `logits.as_subclass(torch.Tensor)`."
    )


def _warn(name: str) -> None:
    warnings.warn(
        f"`{name}` is of this rank's classes only. Reduce it over the ranks, and take it of "
        "`logits.as_subclass(torch.Tensor)` to say so. For losses of all classes see "
        "`tp_embed.nn.loss.cross_entropy()` and `head.loss(x, target)`.",
        stacklevel=5,
    )
