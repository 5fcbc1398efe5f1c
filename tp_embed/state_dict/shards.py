"""Converts a sharded weight, or an optimizer state of its shape, to and from each form of a state
dict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from tp_embed.gang.collectives import whole_table
from tp_embed.gang.redistribute import redistribute, sendable
from tp_embed.nn.head import ShardedLayer
from tp_embed.partition import Partition, as_slice
from tp_embed.state_dict.dtensors import DTensors, as_dtensor


def layers_of(model: Module) -> Iterator[tuple[str, ShardedLayer]]:
    """Yields the sharded layers, each with the prefix of its keys; a layer that is registered in
    several places, as in models with several heads, once for each of them."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShardedLayer):
            yield f"{name}." if name else "", module


def is_partitioned(layer: ShardedLayer) -> bool:
    """Returns whether ZeRO 3 has partitioned the weight."""
    return hasattr(layer.weight, "ds_shape")


def table_shape(layer: ShardedLayer) -> tuple[int, int]:
    """Returns the sizes of the whole table: V, E."""
    rows, columns = layer.weight.shape
    size = layer.partition.size
    return (rows, size) if layer.shard_dim else (size, columns)


def record_of(layer: ShardedLayer) -> dict[str, int]:
    """Returns which shard of the table this rank holds, as a state dict records it."""
    return layer.shard_record()


def gathered(
    layer: ShardedLayer, block: Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Gathers the whole table from each rank's ``block``, of the shape of ``layer.weight``."""
    if layer.gang.size == 1:
        return block if device is None else block.to(device)
    whole = whole_table(sendable(block), layer.shard_dim, layer.gang, layer.partition, device)
    return whole.view(block.dtype)


def own_block(layer: ShardedLayer, block: Tensor) -> Tensor:
    """Returns ``block`` unchanged, for a state dict of shards."""
    return block


def distributed(layer: ShardedLayer, block: Tensor) -> Tensor:
    """Returns ``block`` as a DTensor of the whole table, which is cut into blocks: sends rows of a
    cyclic table to the ranks of their blocks, at most the size of a shard."""
    old = layer.partition
    if old.cyclic and layer.gang.size > 1:
        block = redistribute(block, old, Partition(old.size, old.num_shards), layer.gang)
    size = layer.partition.size
    shape = (len(block), size) if layer.shard_dim else (size, *block.shape[1:])
    return as_dtensor(block, layer.shard_dim, shape, layer.gang)


def gathered_rows(layer: ShardedLayer, values: Tensor) -> Tensor:
    """Gathers values by row, of the shape (V_rank,) or (V_rank, 1). Of a table that is sharded
    along its embedding dimension each rank has all of them."""
    if layer.shard_dim == 1 or layer.gang.size == 1:
        return values
    whole = gathered(layer, values.view(len(values), 1))
    return whole.view(-1, *values.shape[1:])


def distributed_rows(layer: ShardedLayer, values: Tensor) -> Tensor:
    """Does :func:`distributed` for values by row."""
    if layer.shard_dim == 1 or layer.gang.size == 1:
        return values
    return distributed(layer, values)


ROW_EXPORTS = {"full": gathered_rows, "dtensor": distributed_rows}
EXPORTS = {"full": gathered, "sharded": own_block, "dtensor": distributed}


def cut_block(
    layer: ShardedLayer,
    key: str,
    value: Any,
    dtensors: DTensors,
    record: object,
    tail: tuple[int, ...] | None = None,
) -> Tensor:
    """Cuts this rank's shard out of ``value``, in any form that a state dict holds at ``key``.

    :param tail: the shape of ``value`` after the rows, if it has one value for each row; ``None``
        if it has the shape of the table.
    """
    own: tuple[int, ...] = tuple(layer.weight.shape)
    shape: tuple[int, ...] = table_shape(layer)
    dim, block = layer.shard_dim, layer.partition.shard(layer.gang.rank)
    if tail is not None:
        own, shape = (own[0], *tail), (shape[0], *tail)
        if dim == 1:  # Each rank has all rows.
            block, dim = range(shape[0]), 0
    if isinstance(value, DTensor):
        value, is_whole = dtensors.on_this_rank(key, value, layer.shard_dim, shape, layer.gang)
        if is_whole:
            return _cut(value, dim, block)
        new = layer.partition
        if new.cyclic and layer.gang.size > 1:
            value = redistribute(value, Partition(new.size, new.num_shards), new, layer.gang)
        return value  # type: ignore[no-any-return]
    if hasattr(value, "local_shards"):
        _check_shape(tuple(value.size()), shape)
        return _cut_shards(layer, value)
    if record not in (None, record_of(layer)):
        raise ValueError(
            f"must be whole or this rank's shard {record_of(layer)}, but is the shard "
            f"{record} instead. Save it whole, or as a DTensor."
        )
    if tuple(value.shape) == own:
        return value  # type: ignore[no-any-return]
    if tuple(value.shape) != shape:
        raise ValueError(
            f"must have the shape {shape}, or {own} as the shard of rank {layer.gang.rank} of "
            f"{layer.gang.size}, but has {tuple(value.shape)} instead."
        )
    return _cut(value, dim, block)


def _cut(whole: Tensor, dim: int, block: range) -> Tensor:
    return whole[:, as_slice(block)] if dim else whole[as_slice(block)]


def _check_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"must have the shape {expected}, but has {found} instead.")


def _cut_shards(layer: ShardedLayer, value: Any) -> Tensor:
    """Cuts this rank's shard out of the local shards of a ``ShardedTensor``."""
    dim, own = layer.shard_dim, layer.partition.shard(layer.gang.rank)
    for shard in value.local_shards() if own.step == 1 else ():
        start, size = shard.metadata.shard_offsets[dim], shard.metadata.shard_sizes[dim]
        is_whole_across = shard.metadata.shard_sizes[1 - dim] == layer.weight.shape[1 - dim]
        if start <= own.start and own.stop <= start + size and is_whole_across:
            return shard.tensor.narrow(dim, own.start - start, len(own))  # type: ignore[no-any-return]
    raise ValueError(
        f"must have a local shard that covers {own} along dimension {dim}, but has none. Save it "
        "whole, or as a DTensor."
    )
