"""Classes for models of transformers and PEFT that know that their tables are sharded."""

from __future__ import annotations

from collections.abc import Collection

from torch.nn import Module
from transformers import PreTrainedModel

from .forward import check_forward
from .layers import has_shards
from .mixins import give_class
from .resize import ResizesShards
from .save import SavesShards


def adapt(model: Module) -> None:
    """Replaces the class of each model of transformers in ``model`` that has sharded tables by a
    subclass: its ``save_pretrained()`` writes whole tables, and its ``resize_token_embeddings()``
    resizes shards. Adapts models and embeddings of PEFT, too.

    :func:`tp_embed.shard_embeddings` calls it. Idempotent.
    """
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel) and has_shards(module):
            give_class(module, ResizesShards, SavesShards)
    check_forward(model)
    if _has_peft(model):
        from .lora import adapt_lora  # An optional dependency, installed here.

        adapt_lora(model)


def check_adapters(model: Module, tables: Collection[Module]) -> None:
    """Checks that adapters of ``tables``, and a replaced ``forward`` of ``model``, work with
    sharded tables."""
    check_forward(model, tables)
    if _has_peft(model):
        from . import lora

        lora.check_adapters(model, tables)


def _has_peft(model: Module) -> bool:
    return any(type(module).__module__.startswith("peft.") for module in model.modules())
