"""Finds the tables that AutoTP cuts itself, together with the attention heads that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from tp_embed.surgery.discovery import TableGroup

from .private import AutoTP, AutoTPMeta, PartitionType, get_hf_tp_plan, get_tensor_parallel_config

NOTE = "left to AutoTP, which cuts its columns with the attention heads"


def per_head_tables(
    model: Module, config: Mapping[str, Any], tables: Sequence[TableGroup]
) -> list[str]:
    """Returns the names of tables with one column per attention head that AutoTP will cut, such as
    T5's relative position biases. A rank needs the columns of its own heads, but a sharded table
    returns all of them."""
    num_heads = AutoTPMeta.from_model_config(getattr(model, "config", None)).num_attention_heads
    found = [
        name
        for group in tables
        if not group.heads and _shape(group.weight)[-1] == num_heads
        for name in group.names
    ]
    cut = _cut_by_autotp(model, config) if found else set()
    return [name for name in found if name in cut]


def _shape(weight: Tensor) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))  # At ZeRO 3.


def _cut_by_autotp(model: Module, config: Mapping[str, Any]) -> set[str]:
    """Returns the names of all modules that AutoTP would cut if they were embeddings."""
    tensor_parallel = get_tensor_parallel_config(config)
    if tensor_parallel.autotp_size <= 1:
        return set()
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    partition = tensor_parallel.get_partition_config_object()
    if partition is not None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        specs = {name: partition.find_matching_spec(f"{name}.weight", model_type) for name in names}
        return {
            n for n, spec in specs.items() if spec and spec.partition_type != PartitionType.SKIP
        }
    if get_hf_tp_plan(model):  # Such a plan cuts no embeddings.
        return set()
    blocks = tuple({block for block, _ in AutoTP.tp_parser(model)})
    return {
        name
        for prefix, block in model.named_modules(remove_duplicate=False)
        if isinstance(block, blocks)
        for name in names
        if name.startswith(f"{prefix}.")
    }
