"""Shards the tables of a model by a DeepSpeed config, before another library builds its engine."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import nn
from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.gang import Gang
from tp_embed.integrations.deepspeed.config import gather_when_saving, read_section
from tp_embed.integrations.deepspeed.private import PartitionType, get_tensor_parallel_config
from tp_embed.integrations.deepspeed.sharding import shard_model
from tp_embed.surgery.optimizer import Groups
from tp_embed.surgery.report import ShardingReport


def shard_by_config(
    model: Module,
    config: dict[str, Any],
    optimizer: Optimizer | None = None,
    parameters: Groups | None = None,
    **keys: Any,
) -> ShardingReport:
    """Shards the tables of ``model`` by the section ``"tp_embed"`` of ``config``, and sets its
    ``zero_optimization`` so that engines save whole models. ``keys`` replace the section's.

    All ranks must call it. Runs the checks of
    :func:`tp_embed.integrations.deepspeed.initialize`.
    """
    deepspeed.init_distributed()
    ds_config, section = read_section(config, **keys)
    if section.options.uses_world:
        raise ValueError(
            "`tp_embed.rules` must not have 'world' with the Trainer or Accelerate, whose engines "
            "would average the shards. Build the engine by `tp_embed.integrations.deepspeed."
            "initialize()`, or use 'vocab' or 'embed'."
        )

    def check(gang: Gang) -> None:
        if gang.size > 1:
            check_lora(model, ds_config)

    report = shard_model(
        model, ds_config, section, optimizer=optimizer, parameters=parameters, check=check
    )
    config.update(gather_when_saving(config))
    return report


def check_lora(model: Module, ds_config: dict[str, Any]) -> None:
    """
    :raises ValueError: AutoTP would cut layers with LoRA adapters, which it does not support.
    """
    adapted = [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and isinstance(module.base_layer, nn.Linear)
        for parameter, _ in module.named_parameters()
        if parameter.startswith(("base_layer.", "lora_A.", "lora_B."))
    ]
    partition = get_tensor_parallel_config(ds_config).get_partition_config_object()
    for name in adapted:
        spec = None if partition is None else partition.find_matching_spec(name)
        is_left = spec is None or spec.partition_type == PartitionType.SKIP
        if partition is None or partition.use_default_specs or not is_left:
            raise ValueError(
                "`tensor_parallel.partition_config` must name, without the default specs, the "
                f"layers for AutoTP to cut, and none with adapters of LoRA, but AutoTP would cut "
                f"`{name}`, and the adapter would not fit it. Name layers without adapters: "
                '`{"use_default_specs": false, "layer_specs": [...]}`.'
            )
