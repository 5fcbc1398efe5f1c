"""Carries what hangs on a table over to the shard that takes its place: hooks and attributes of the
Parameter, its gradient, and attributes of the modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Module

from tp_embed.lookup.gradient import keeps_coalesced
from tp_embed.lookup.train_rows import RowMask
from tp_embed.nn.embedding import StandardEmbedding
from tp_embed.parameter.sharded import ShardedParameter, name_shard
from tp_embed.surgery.optimizer import Shard

_F = TypeVar("_F", bound=Callable[..., object])

_MODULE_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_PARAMETER_HOOKS = {
    "_backward_hooks": "register_hook",
    "_post_accumulate_grad_hooks": "register_post_accumulate_grad_hook",
}
# How Megatron marks a Parameter that is not cut.
_MEGATRON = ("tensor_model_parallel", "partition_dim", "partition_stride")
# What `deepspeed.zero.Init` leaves on a Parameter besides functions.
_ZERO_INIT = ("ds_", "is_external_param", "nvme_swapper")
# What torch and we set on modules, which the new ones have themselves.
_OF_TORCH = {*vars(nn.Embedding(1, 1, device="meta")), *vars(nn.Linear(1, 1, device="meta"))}
_OURS = {*vars(StandardEmbedding(1, 1, device="meta", train_rows=[0]))}
_PROPERTIES = {"partition", "rows", "columns", "reuse_grad", "shard_dim", "outputs"}
_OWN_METHODS = {"__init__", "__repr__", "_get_name", "extra_repr", "forward"}


def shardwise(hook: _F) -> _F:
    """Marks a hook of a Parameter (``register_hook``, ``register_post_accumulate_grad_hook``) as
    one that may be given a block of a table in the place of the whole table, as one that treats
    each item alone may: ``weight.register_hook(shardwise(lambda grad: grad.clamp(-1, 1)))``.
    :func:`~tp_embed.shard_embeddings` carries it over, and refuses others."""
    marked: Any = partial(hook) if inspect.ismethod(hook) else hook
    marked._tp_embed_shardwise = True
    return marked  # type: ignore[no-any-return]


def check_parameter(weight: Tensor, name: str, fix: str) -> None:
    """
    :raises ValueError: ``weight`` has hooks or attributes that may expect the whole table.
    """
    for hooks, register in _PARAMETER_HOOKS.items():
        for hook in (getattr(weight, hooks) or {}).values():
            if not _fits_shards(hook):
                raise ValueError(
                    f"The weight of the table '{name}' must have no hook that expects the whole "
                    f"table, but has {_describe(hook)} by `{register}`. If it masks rows, pass "
                    "`train_rows` in the place of it; if it treats each item alone, mark it: "
                    f"`{register}(tp_embed.shardwise(hook))`; else register it on the new weight. "
                    f"{fix}"
                )
    for attribute, value in _attributes(weight):
        if hasattr(ShardedParameter, attribute):
            raise ValueError(_collides(f"The weight of the table '{name}'", attribute, value, fix))
        if not _is_plain(value):
            raise ValueError(
                f"The weight of the table '{name}' must have plain values as attributes, which "
                f"do not depend on its shape, but `{attribute}` is a `{type(value).__name__}`. "
                f"Delete it, and set it on the new weight if it fits that. {fix}"
            )


def _fits_shards(hook: Any) -> bool:
    return keeps_coalesced(hook) or getattr(hook, "_tp_embed_shardwise", False)


def _describe(hook: Any) -> str:
    name = getattr(hook, "__qualname__", type(hook).__name__)
    return f"`{getattr(hook, '__module__', '?')}.{name}`"


def _attributes(weight: Tensor) -> Iterator[tuple[str, Any]]:
    """What others have set on ``weight``."""
    is_zero_param = hasattr(weight, "ds_id")
    for name, value in vars(weight).items():
        of_zero = is_zero_param and (name.startswith(_ZERO_INIT) or callable(value))
        if not (of_zero or name in _MEGATRON or name.startswith("_dynamo")):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    kinds = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
    return isinstance(value, kinds) or (isinstance(value, Tensor) and not value.ndim)


def carry_parameter(old: Tensor, shard: Shard, shard_dim: int, table: str) -> None:
    """Gives the Parameter of ``shard`` what ``old`` has, and the name of the table for errors. The
    handles of hooks stay good."""
    new = shard.parameter
    name_shard(new, table)
    for name in _PARAMETER_HOOKS:
        theirs, ours = getattr(old, name), getattr(new, name)
        if theirs:
            masks = [key for key, hook in theirs.items() if isinstance(hook, RowMask)]
            for key in masks:  # Of other rows.
                del theirs[key]
            theirs.update(ours or {})
            setattr(new, name, theirs)
    for name, value in _attributes(old):
        if name not in vars(new):
            setattr(new, name, value)
    if hasattr(old, _MEGATRON[0]) and not hasattr(new, _MEGATRON[0]):
        for name, value in zip(_MEGATRON, (True, shard_dim, 1), strict=True):
            setattr(new, name, value)
    if old.grad is not None:
        grad = shard.cut(old.grad.to_dense())
        new.grad = grad.to_sparse(1) if old.grad.is_sparse else grad


def check_module(module: Module, name: str, fix: str) -> None:
    """
    :raises TypeError: the class of ``module`` changes what all modules do.
    :raises ValueError: its attributes collide with those of a sharded one.
    """
    for kind in type(module).__mro__:
        if kind in (nn.Embedding, nn.Linear, StandardEmbedding):
            break
        for method, value in vars(kind).items():
            if inspect.isfunction(value) and hasattr(Module, method) and method not in _OWN_METHODS:
                raise TypeError(
                    f"The table '{name}' must be of a class that leaves `{method}` as it is, but "
                    f"`{kind.__name__}` has one of its own, which a sharded table would not run. "
                    f"{fix}"
                )
    for attribute, value in _own_attributes(module):
        if callable(value) and hasattr(Module, attribute):
            raise TypeError(
                f"The table '{name}' must leave `{attribute}` as its class has it, but has set "
                f"another, which a sharded table would not run. {fix}"
            )
        if attribute in _OURS or attribute in _PROPERTIES:
            raise ValueError(_collides(f"The table '{name}'", attribute, value, fix))


def _collides(what: str, attribute: str, value: object, fix: str) -> str:
    return (
        f"{what} must have no attribute `{attribute}`, which means something else if it is "
        f"sharded, but has {value!r}. Give it another name. {fix}"
    )


def _own_attributes(module: Module) -> Iterator[tuple[str, Any]]:
    """What is neither torch's nor, for a StandardEmbedding, ours."""
    known = _OF_TORCH | {"_compiled_call_impl"}
    if isinstance(module, StandardEmbedding):
        known |= _OURS
    return ((name, value) for name, value in vars(module).items() if name not in known)


def carry_module(old: Module, new: Module) -> None:
    """Gives ``new`` the mode, the hooks and the attributes of ``old``."""
    new.train(old.training)
    for hooks in _MODULE_HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for name, value in _own_attributes(old):
        setattr(new, name, value)
    for name in old._non_persistent_buffers_set:
        if not hasattr(new, name):
            new.register_buffer(name, old._buffers[name], persistent=False)


class LostInit:
    """The ``init_fn`` of a table whose class has a ``reset_parameters`` of its own."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, embed: object) -> NoReturn:
        raise ValueError(
            f"A table that was a `{self._kind}` must have an `init_fn` to be initialized anew, "
            "since the `reset_parameters` of that class is lost. Pass one to `shard_embeddings()`."
        )


class _Retired:
    """The ``forward`` of a module that was replaced."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError(self._message)


def retire(old: Module, new: Module, name: str) -> None:
    """Makes ``old`` raise when it is called. Its state can be read as before."""
    old._compiled_call_impl = None
    old.forward = _Retired(
        f"This `{type(old).__name__}` must not be called any more: `shard_embeddings()` has put a "
        f"`{type(new).__name__}` in the place of it, '{name}' of the model. Take that one from the "
        "model wherever this one is kept: in a list, a closure, or another model."
    )
