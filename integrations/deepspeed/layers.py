"""Makes DeepSpeed treat our layers as its own `TensorParallel_Layer`.

DeepSpeed describes a tensor-parallel Parameter by attributes of it. AutoTP skips modules that are
marked as `replaced`.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from tp_embed.gang import Gang
from tp_embed.gang.collectives import whole_table
from tp_embed.nn.deferred import DeferredLogits
from tp_embed.nn.embedding import RowWiseEmbedding
from tp_embed.nn.head import ShardedLayer
from tp_embed.nn.late_calls import ENGINES
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition

from .layout import local_shape
from .private import (
    DS_IS_REPLACED_MODULE,
    TensorParallel_Layer,
    check_before_saving,
    describe,
    mark_distinct,
    mark_replaced,
    pass_outputs,
)

for _layer in get_args(ShardedLayer):
    TensorParallel_Layer.register(_layer)
pass_outputs(DeferredLogits)  # Their hidden states come from other modules.
ENGINES.add("deepspeed")


def _refuse_whole(engine: Any, method: str) -> None:
    """Refuses to gather a whole model where DeepSpeed would take one rank's shards of tables for
    it: it gathers them with AutoTP, in some methods, and never tables that it does not train."""
    kinds = (*get_args(ShardedLayer), RowWiseEmbedding)
    layers = [m for m in engine.module.modules() if isinstance(m, kinds) and m.gang.size > 1]
    consolidates = method == "_consolidated_16bit_state_dict"
    gathers = engine.autotp_size() > 1 and (engine.zero_optimization_stage() == 3 or consolidates)
    if any(not gathers or m.is_apart or isinstance(m, RowWiseEmbedding) for m in layers):
        raise ValueError(
            "`tp_embed.integrations.deepspeed.export()` must save the whole model of this engine, "
            "since DeepSpeed would save the shards of one rank as whole tables. Call "
            "`export(engine, directory)` on all ranks instead."
        )


check_before_saving(_refuse_whole)


def register_layer(layer: Module, gang: Gang) -> None:
    """Marks the weight of a sharded embedding or head as tensor-parallel, for gradient norms,
    gathering and universal checkpoints. Idempotent."""
    if not isinstance(layer, ShardedLayer):
        raise TypeError(
            "`layer` must be a sharded embedding or a head tied to one, "
            f"but is a `{type(layer).__name__}` instead."
        )
    layer.replaced = True  # type: ignore[assignment]
    if isinstance(layer, RowWiseEmbedding):
        if gang.size > 1:
            mark_distinct(layer.weight)
        return
    weight, partition, dim = layer.weight, layer.partition, layer.shard_dim
    if hasattr(weight, DS_IS_REPLACED_MODULE):
        return  # Registered before, or by the embedding that shares it with a head.

    shard = _Shard(gang, partition, dim)
    mark_replaced(weight, shard.gather_params, shard.partition_params)
    describe_parameter(weight, dim, partition.sizes)


def describe_parameter(
    parameter: Parameter, dim: int, sizes: tuple[int, ...], *, unsupported: str | None = None
) -> None:
    """Tells universal checkpoints how many rows (``dim`` 0) or columns (``dim`` 1) of
    ``parameter`` each rank of a gang holds, or why they cannot merge it."""
    shape = local_shape(parameter)
    logical = [*shape[:dim], sum(sizes), *shape[dim + 1 :]]
    # As `HiddenParallelEmbedding` and `VocabParallelEmbedding` do, except for `original_shape`:
    # DeepSpeed would assume that this is the only vocabulary-parallel table, and would cut others
    # to its size when it merges them.
    describe(
        parameter,
        len(sizes),
        partition_type="row" if dim else "column",
        partition_dim=dim,
        logical_shape=tuple(logical),
        output_shape=(logical[0],),
        partition_sizes=sizes,
        target_partition_shape=shape,
        unsupported_reason=unsupported,
    )


class _Shard:
    """Gathers its Parameter in place, and restores the shard."""

    def __init__(self, gang: Gang, partition: Partition, dim: int) -> None:
        self._gang, self._partition, self._dim = gang, partition, dim
        self._shard: Tensor | None = None

    @torch.no_grad()
    def gather_params(self, params: list[Parameter]) -> None:
        """All ranks have to call it. Sends (P-1) times the largest shard."""
        for param in filter(_is_sharded, params):
            self._shard = local(param)
            param.data = whole_table(self._shard, self._dim, self._gang, self._partition)

    @torch.no_grad()
    def partition_params(self, params: list[Parameter]) -> None:
        for param in filter(_is_sharded, params):
            own = self._partition.shard(self._gang.rank)
            shard = local(param).narrow(self._dim, own.start, len(own))
            if self._shard is None:
                param.data = shard.clone()
            else:
                # Keep the memory: it may be a view of an optimizer's flat buffer.
                self._shard.copy_(shard)
                param.data, self._shard = self._shard, None


def _is_sharded(param: Any) -> bool:
    return getattr(param, DS_IS_REPLACED_MODULE, False)
