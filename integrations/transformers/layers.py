"""The sharded layers of a model, and their whole tables."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import Module

from tp_embed.gang.collectives import gather_table
from tp_embed.nn.head import ShardedLayer
from tp_embed.parameter.sharded import local


def sharded_layers(model: Module) -> Iterator[tuple[str, ShardedLayer]]:
    """Yields the sharded embeddings and heads of ``model`` with the names of their weights."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShardedLayer):
            yield f"{name}.weight" if name else "weight", module


def has_shards(model: Module) -> bool:
    """Returns whether ``model`` has a sharded embedding or head."""
    return any(True for _ in sharded_layers(model))


def table_shape(layer: ShardedLayer) -> tuple[int, int]:
    """Returns the shape of the whole table, (V, E)."""
    shape = list(getattr(layer.weight, "ds_shape", layer.weight.shape))  # At ZeRO 3.
    shape[layer.shard_dim] = layer.partition.size
    return shape[0], shape[1]


def gather_into(output: Tensor, layer: ShardedLayer) -> None:
    """Gathers the whole table into ``output``, on any device. All ranks of the gang call it; a rank
    whose ``output`` is on meta only takes part."""
    gather_table(output, local(layer.weight), layer.shard_dim, layer.gang, layer.partition)
