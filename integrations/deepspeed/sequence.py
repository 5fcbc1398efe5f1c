"""What DeepSpeed does with the gradients of a sequence group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.nn import Module

from .private import is_zero_param


def averages_over_sequence(config: Mapping[str, Any]) -> bool:
    """Returns whether an engine of ``config`` averages gradients over its sequence group, the
    argument ``averaged`` of :func:`tp_embed.nn.sequence.mean_over_sequence`.

    DeepSpeed 0.19.8 divides by the number of data-parallel ranks, so gradients of a sequence group
    add up; but ZeRO 3 divides by the number of all ranks unless ``reduce_scatter`` is false.

    :param config: the DeepSpeed config.
    """
    zero = config.get("zero_optimization") or {}
    return _is_stage3(config) and bool(zero.get("reduce_scatter", True))


def _is_stage3(config: Mapping[str, Any]) -> bool:
    return (config.get("zero_optimization") or {}).get("stage", 0) == 3


def check_sequence_groups(model: Module, mpu: Any, config: Mapping[str, Any]) -> None:
    """
    :raises ValueError: ZeRO 3 would leave out gradients of other ranks of the sequence group, since
        DeepSpeed 0.19.8 partitions over the data-parallel group of an ``mpu`` that has one.
    """
    names = "get_data_parallel_group", "get_sequence_data_parallel_group"
    if not _is_stage3(config) or not all(hasattr(mpu, name) for name in names):
        return
    data, both = (dist.get_process_group_ranks(getattr(mpu, name)()) for name in names)
    if set(data) != set(both) and not any(map(is_zero_param, model.parameters())):
        raise ValueError(
            f"ZeRO 3 must partition the model over data-parallel and sequence ranks, {both}, but "
            f"would partition it over `mpu.get_data_parallel_group()`, {data}, and leave out "
            "gradients of the sequence group. Build the model in `with deepspeed.zero.Init("
            "config_dict_or_path=config, data_parallel_group="
            "mpu.get_sequence_data_parallel_group()):`, or use ZeRO 1 or 2."
        )
