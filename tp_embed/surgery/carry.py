"""Carries hooks, attributes and gradients over from a table to the shard that replaces it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import Enum
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Module

from tp_embed.lookup.gradient import keeps_coalesced
from tp_embed.lookup.options import LookupOptions
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
# Megatron sets these on Parameters, cut or not.
_MEGATRON = ("tensor_model_parallel", "partition_dim", "partition_stride")
# `deepspeed.zero.Init` sets these on a Parameter, besides functions.
_ZERO_INIT = ("ds_", "is_external_param", "nvme_swapper")
# Attributes of a new module that must not be overwritten.
_TORCH_ATTRIBUTES = {
    *vars(nn.Embedding(1, 1, device="meta")),
    *vars(nn.Linear(1, 1, device="meta")),
}
_STANDARD_ATTRIBUTES = {*vars(StandardEmbedding(1, 1, device="meta", train_rows=[0]))}
_PROPERTIES = {
    "gang",
    "num_embeddings",
    "embed_dim",
    "pad_idx",
    "partition",
    "rows",
    "columns",
    "shard_dim",
    "outputs",
}
_PROPERTIES |= {option.name for option in fields(LookupOptions)}
_OWN_METHODS = {"__init__", "__repr__", "_get_name", "extra_repr", "forward"}


def shardwise(hook: _F) -> _F:
    """Marks an elementwise hook of a Parameter (``register_hook``,
    ``register_post_accumulate_grad_hook``), which works on a block of a table as on all of it:
    ``weight.register_hook(shardwise(lambda grad: grad.clamp(-1, 1)))``.
    :func:`~tp_embed.shard_embeddings` carries it over, and refuses unmarked hooks."""
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
                    "`train_rows` instead; if it is elementwise, mark it: "
                    f"`{register}(tp_embed.shardwise(hook))`; else register it on the new weight. "
                    f"{fix}"
                )
    for attribute, value in _user_attributes(weight):
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


def _user_attributes(weight: Tensor) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of ``weight`` that neither torch, DeepSpeed nor Megatron has set."""
    is_zero_param = hasattr(weight, "ds_id")
    for name, value in vars(weight).items():
        set_by_zero = is_zero_param and (name.startswith(_ZERO_INIT) or callable(value))
        if not (set_by_zero or name in _MEGATRON or name.startswith("_dynamo")):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    kinds = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
    return isinstance(value, kinds) or (isinstance(value, Tensor) and not value.ndim)


def carry_parameter(old: Tensor, shard: Shard, shard_dim: int, table: str) -> None:
    """Copies hooks, attributes and gradient of ``old`` to the Parameter of ``shard``, and names it
    after its table for errors. Handles of hooks stay valid."""
    new = shard.parameter
    name_shard(new, table)
    for name in _PARAMETER_HOOKS:
        old_hooks, new_hooks = getattr(old, name), getattr(new, name)
        if old_hooks:
            masks = [key for key, hook in old_hooks.items() if isinstance(hook, RowMask)]
            for key in masks:  # They mask rows of the whole table.
                del old_hooks[key]
            old_hooks.update(new_hooks or {})
            setattr(new, name, old_hooks)
    for name, value in _user_attributes(old):
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
    :raises TypeError: ``module`` overrides a method of ``nn.Module``.
    :raises ValueError: its attributes collide with attributes of a sharded table.
    """
    for kind in type(module).__mro__:
        if kind in (nn.Embedding, nn.Linear, StandardEmbedding):
            break
        for method, value in vars(kind).items():
            if inspect.isfunction(value) and hasattr(Module, method) and method not in _OWN_METHODS:
                raise TypeError(
                    f"The table '{name}' must not override `{method}`, but `{kind.__name__}` does, "
                    f"and a sharded table would not run it. {fix}"
                )
    for attribute, value in _added_attributes(module):
        if callable(value) and hasattr(Module, attribute):
            raise TypeError(
                f"The table '{name}' must not replace `{attribute}` on the instance, but does, "
                f"and a sharded table would not run it. {fix}"
            )
        if attribute in _STANDARD_ATTRIBUTES or attribute in _PROPERTIES:
            raise ValueError(_collides(f"The table '{name}'", attribute, value, fix))


def _collides(what: str, attribute: str, value: object, fix: str) -> str:
    return (
        f"{what} must have no attribute `{attribute}`, which sharding uses itself, "
        f"but has {value!r}. Give it another name. {fix}"
    )


def _added_attributes(module: Module) -> Iterator[tuple[str, Any]]:
    """Returns the attributes that neither torch nor ``StandardEmbedding`` has set."""
    known = _TORCH_ATTRIBUTES | {"_compiled_call_impl"}
    if isinstance(module, StandardEmbedding):
        known |= _STANDARD_ATTRIBUTES
    return ((name, value) for name, value in vars(module).items() if name not in known)


def carry_module(old: Module, new: Module) -> None:
    """Copies the training mode, hooks and attributes of ``old`` to ``new``."""
    new.train(old.training)
    for hooks in _MODULE_HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for name, value in _added_attributes(old):
        setattr(new, name, value)
    for name in old._non_persistent_buffers_set:
        if not hasattr(new, name):
            new.register_buffer(name, old._buffers[name], persistent=False)


class LostInit:
    """Raises where a table would need the ``reset_parameters`` of its former class."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, embed: object) -> NoReturn:
        raise ValueError(
            f"A table that was a `{self._kind}` must have an `init_fn` to be reinitialized, since "
            "the `reset_parameters` of that class is lost. Pass one to `shard_embeddings()`."
        )


class _Retired:
    """Replaces the ``forward`` of a retired module by an error."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError(self._message)


def retire(old: Module, new: Module, name: str) -> None:
    """Makes ``old`` raise when called. Its state stays readable."""
    old._compiled_call_impl = None
    old.forward = _Retired(
        f"This `{type(old).__name__}` must not be called any more: `shard_embeddings()` replaced "
        f"it by a `{type(new).__name__}` at '{name}' of the model. Use that one wherever this one "
        "is kept: in a list, a closure, or another model."
    )
