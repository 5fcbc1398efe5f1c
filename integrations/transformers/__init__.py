"""Hugging Face: transformers, its Trainer, Accelerate and PEFT, with sharded tables.

Imports names on first use, since Accelerate, PEFT and DeepSpeed are optional.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .accelerate import prepare
    from .classes import adapt, check_adapters
    from .load import from_pretrained
    from .lora import get_peft_model
    from .loss import check_loss, fuse_loss, fusible_model, shard_logits
    from .trainer import ShardTables

_MODULE_OF = {
    "ShardTables": "trainer",
    "adapt": "classes",
    "check_adapters": "classes",
    "check_loss": "loss",
    "from_pretrained": "load",
    "fuse_loss": "loss",
    "fusible_model": "loss",
    "get_peft_model": "lora",
    "prepare": "accelerate",
    "shard_logits": "loss",
}

__all__ = [
    "ShardTables",
    "adapt",
    "check_adapters",
    "check_loss",
    "from_pretrained",
    "fuse_loss",
    "fusible_model",
    "get_peft_model",
    "prepare",
    "shard_logits",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
