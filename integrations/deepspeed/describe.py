"""Describes a model to DeepSpeed's universal checkpoints, as AutoTP does for those that it cuts."""

from __future__ import annotations

import re
from typing import Any

from deepspeed.checkpoint.constants import (
    DS_AUTOTP_UC_META,
    PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    TP_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_INFO,
)
from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info
from torch.nn import Module


def describe_model(model: Module) -> None:
    """Leaves on ``model`` what a universal checkpoint has to know of its Parameters: those of our
    layers describe themselves, those of Megatron-style layers have ``tensor_model_parallel`` and
    ``partition_dim``, and the rest is the same on every rank of a gang.

    AutoTP does it again later, for all that it cuts. A model with a description of its own keeps
    it, and it has to cover our layers.
    """
    if hasattr(model, UNIVERSAL_CHECKPOINT_INFO):
        return
    info: dict[str, Any] = collect_autotp_universal_checkpoint_info(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, DS_AUTOTP_UC_META):
            continue
        if getattr(parameter, "tensor_model_parallel", False):
            pattern = f"^{re.escape(name)}$"
            info[TP_REPLICATED_PARAMETER_PATTERNS].remove(pattern)
            if getattr(parameter, "partition_dim", 0) == 1:
                info[PARAMETER_WITH_ROW_PARALLELISM_PATTERNS].append(pattern)
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, info)
