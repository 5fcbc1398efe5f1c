"""DeepSpeed's `safe_get_full_*` and `safe_set_full_*` for sharded tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tp_embed.nn.head import ShardedLayer
from tp_embed.parameter.sharded import as_shard, local

from .layout import local_shape
from .private import (
    after_linking,
    is_of_engine,
    link_empty,
    set_stage3,
    stage3_of,
)

_SETTERS = ("set_full_hp_param", "set_full_hp_grad")


def guard_full_values(model: Module, optimizer: Any) -> None:
    """Guards the weights of tables now, and whenever the engine's optimizer links its fp32 values
    to them, as it does again after loading a checkpoint."""
    after_linking(optimizer, lambda: _guard(model))


def _guard(model: Module) -> None:
    """Makes setters take this rank's block from a whole table, and refuse shapes other than the
    shard's: at ZeRO 1 and 2, DeepSpeed would read the first items. At ZeRO 3, marks the values that
    getters return as shards, as they already are at other stages."""
    for layer in model.modules():
        if isinstance(layer, ShardedLayer):
            known = vars(layer.weight)
            if layer.weight.numel() == 0 and not is_of_engine(layer.weight):
                _link_empty(layer.weight)
            for name in _SETTERS:
                setter = known.get(name)
                if setter is not None and not hasattr(setter, "is_guarded"):
                    setattr(layer.weight, name, _guarded(layer, setter))
            optimizer = stage3_of(layer.weight)
            if optimizer is not None and not isinstance(optimizer, _Stage3):
                set_stage3(layer.weight, _Stage3(layer, optimizer))


def _link_empty(weight: Any) -> None:
    """Links an empty shard as DeepSpeed links the other shards of the table at ZeRO 1 and 2."""

    def get(*_: Any) -> Tensor | None:
        return as_shard(torch.empty_like(weight, dtype=torch.float32), weight)

    link_empty(weight, get)


def _guarded(layer: Any, setter: Callable[..., None]) -> Callable[..., None]:
    def set_block(value: Tensor, *args: Any, **kwargs: Any) -> None:
        dim, own = layer.shard_dim, layer.partition.shard(layer.gang.rank)
        shard = local_shape(layer.weight)
        table = tuple(layer.partition.size if i == dim else n for i, n in enumerate(shard))
        if tuple(value.shape) == table:
            value = local(value).narrow(dim, own.start, len(own))
        elif tuple(value.shape) != tuple(shard):
            raise ValueError(
                f"`value` must have the shape of the table, {table}, or of this rank's shard, "
                f"{tuple(shard)}, but has {tuple(value.shape)} instead."
            )
        setter(local(value), *args, **kwargs)

    set_block.is_guarded = True  # type: ignore[attr-defined]
    return set_block


class _Stage3:
    """Wraps DeepSpeed's ZeRO 3 optimizer for the weight of ``layer``, which refers to it."""

    def __init__(self, layer: Any, optimizer: Any) -> None:
        self._layer, self._optimizer = layer, optimizer
        self.set_full_hp_param = _guarded(layer, optimizer.set_full_hp_param)
        self.set_fp32_grad_for_param = _guarded(layer, optimizer.set_fp32_grad_for_param)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_optimizer"), name)

    def get_full_hp_param(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return as_shard(self._optimizer.get_full_hp_param(*args, **kwargs), self._layer.weight)

    def get_fp32_grad_for_param(self, param: Any) -> Tensor | None:
        return as_shard(self._optimizer.get_fp32_grad_for_param(param), self._layer.weight)
