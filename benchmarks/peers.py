"""Builds other libraries' sharded embeddings, from their packages where these can be installed.

Megatron-LM's and fairseq2's are reimplemented with the same collectives, order, tensors and copies.
All layers get the table's shard from outside, so that layers with the same cut share its memory.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import Module, Parameter
from torch.nn.functional import embedding

from tp_embed import ProcessGroupGang
from tp_embed.partition import Partition


@dataclass(frozen=True)
class Setting:
    """The tensors to build a layer from: this rank's shards by what is cut, "embed" or "vocab", and
    the "whole" table, in untouched memory."""

    gang: ProcessGroupGang
    shards: dict[str, Tensor]

    @property
    def group(self) -> ProcessGroup:
        return self.gang.as_process_group()

    @property
    def table(self) -> Tensor:
        return self.shards["whole"]

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        return DeviceMesh.from_group(self.group, "cpu")


def whole_on_meta(setting: Setting) -> torch.nn.Embedding:
    num_rows, dim = setting.table.shape
    return torch.nn.Embedding(num_rows, dim, device="meta", dtype=setting.table.dtype)


class MegatronEmbedding(Module):
    """Megatron-LM's ``VocabParallelEmbedding`` (megatron/core/tensor_parallel/layers.py).

    Looks up ids of other ranks as 0 and zeros their rows; an all-reduce sums. With
    ``reduce_scatter_embeddings`` the sequence comes first and is reduce-scattered, and the backward
    gathers the gradient. *Shapes:* (B, S) -> (B, S, E), or (S/P, B, E).
    """

    def __init__(self, setting: Setting, reduce_scatter_embeddings: bool = False) -> None:
        super().__init__()
        self.group = setting.group
        self.weight = Parameter(setting.shards["vocab"])
        self.rows = Partition(len(setting.table), setting.gang.size).shard(setting.gang.rank)
        self.reduce_scatter_embeddings = reduce_scatter_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        elsewhere = (ids < self.rows.start) | (ids >= self.rows.stop)
        local = ids.clone() - self.rows.start
        local[elsewhere] = 0
        output = embedding(local, self.weight)
        output[elsewhere, :] = 0.0
        combined: Tensor
        if self.reduce_scatter_embeddings:
            combined = _ReduceScatter.apply(output.transpose(0, 1).contiguous(), self.group)
        else:
            combined = _AllReduce.apply(output, self.group)
        return combined


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, size = group, dist.get_world_size(group)
        output = x.new_empty((len(x) // size, *x.shape[1:]))
        dist.reduce_scatter_single(output, x, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        whole = grad.new_empty((len(grad) * size, *grad.shape[1:]))
        dist.all_gather_single(whole, grad.contiguous(), group=ctx.group)
        return whole, None


class Fairseq2Embedding(Module):
    """fairseq2's ``ShardedEmbedding`` (fairseq2/nn/embedding.py), which cuts the columns.

    All-gathers into a list and concatenates; the backward takes this rank's slice.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.group = setting.group
        self.weight = Parameter(setting.shards["embed"])

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = _GatherList.apply(embedding(ids, self.weight), self.group)
        return output


class _GatherList(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, x.size(-1)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.split(ctx.width, dim=-1)[dist.get_rank(ctx.group)].contiguous(), None


class DTensorEmbedding(Module):
    """``torch.nn.Embedding`` under a style of torch.distributed.tensor.parallel."""

    def __init__(self, setting: Setting, style: ParallelStyle, cut: str) -> None:
        super().__init__()
        table = setting.table
        inner = whole_on_meta(setting)
        self.inner = parallelize_module(inner, setting.mesh, style, src_data_rank=None)
        placement = Shard(1) if cut == "embed" else Shard(0)
        shard = DTensor.from_local(
            setting.shards[cut],
            setting.mesh,
            [placement],
            run_check=False,
            shape=table.shape,
            stride=table.stride(),
        )
        self.inner.weight = Parameter(shard)

    @property
    def weight(self) -> Parameter:
        weight = self.inner.weight
        assert isinstance(weight, Parameter)
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.inner(ids)
        if isinstance(output, AsyncCollectiveTensor):
            output.trigger_wait()  # Else its first use waits.
        return output


def dtensor_column(setting: Setting, sequence: bool = False) -> Module:
    layout = Shard(1) if sequence else Replicate()
    return DTensorEmbedding(setting, ColwiseParallel(output_layouts=layout), "embed")


def dtensor_row(setting: Setting, sequence: bool = False) -> Module:
    layout = Shard(1) if sequence else Replicate()
    style = RowwiseParallel(input_layouts=Replicate(), output_layouts=layout)
    return DTensorEmbedding(setting, style, "vocab")


def deepspeed_layer(setting: Setting, name: str, cut: str) -> Module:
    """Builds a layer of deepspeed.module_inject.layers as AutoTP does for training."""
    layers = _deepspeed_layers()
    layer: Module = getattr(layers, name)(whole_on_meta(setting), setting.group)
    layer.weight = Parameter(setting.shards[cut])
    return layer


@functools.cache
def _deepspeed_layers() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.module_inject import layers
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # An all-reduce for inference, which would need compiling.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)
    layers.set_autotp_mode(training=True)
    return layers
