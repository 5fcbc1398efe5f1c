"""Describes a model to DeepSpeed's universal checkpoints, as AutoTP does for models it cuts."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from tp_embed.gang import Gang

from .layers import describe_parameter
from .layout import local_shape
from .private import (
    DS_AUTOTP_UC_META,
    UNIVERSAL_CHECKPOINT_INFO,
    collect_autotp_universal_checkpoint_info,
)

_DESCRIBED_BY = "described_by", "tp_embed"


def describe_model(model: Module, gang: Gang) -> None:
    """Attaches to ``model`` what a universal checkpoint needs to know of its Parameters. Our layers
    describe their own. Megatron-style layers set ``tensor_model_parallel`` and ``partition_dim``,
    and are cut evenly. All other Parameters are the same on every rank of a gang.

    AutoTP repeats this later for the layers that it cuts. A model that brings its own description
    keeps it; it must cover our layers.
    """
    known = getattr(model, UNIVERSAL_CHECKPOINT_INFO, None)
    if known is not None and not (isinstance(known, dict) and _DESCRIBED_BY in known.items()):
        return
    for parameter in model.parameters():
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        if is_sharded and not hasattr(parameter, DS_AUTOTP_UC_META):
            dim = getattr(parameter, "partition_dim", 0)
            size = local_shape(parameter)[dim]
            stride = getattr(parameter, "partition_stride", 1)
            reason = None if stride == 1 else f"its shards are of {stride} pieces each"
            describe_parameter(parameter, dim, (size,) * gang.size, unsupported=reason)
    info: dict[str, Any] = collect_autotp_universal_checkpoint_info(model)
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, {**info, **dict([_DESCRIBED_BY])})
