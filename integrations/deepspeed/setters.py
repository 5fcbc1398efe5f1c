"""DeepSpeed's `safe_set_full_*` of sharded tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from tp_embed.head import ShardedLayer
from tp_embed.sharded_parameter import local

from .layout import local_shape

_SETTERS = ("set_full_hp_param", "set_full_hp_grad")


def guard_setters(model: Module) -> None:
    """At ZeRO 1 and 2, DeepSpeed reads the first items of what it is given. Lets it have the block
    of this rank of what has the shape of the table, and refuses other shapes than the shard's."""
    for layer in model.modules():
        if isinstance(layer, ShardedLayer):
            for name in _SETTERS:
                setter = vars(layer.weight).get(name)
                if setter is not None and not hasattr(setter, "is_guarded"):
                    setattr(layer.weight, name, _guarded(layer, setter))


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
