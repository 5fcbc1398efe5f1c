"""Classes for models of transformers and PEFT that know of the shards of their tables."""

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
    """Gives each model of transformers in ``model`` that has sharded tables a class that is made
    from its own: its ``save_pretrained()`` writes whole tables, and its
    ``resize_token_embeddings()`` resizes shards. Models and embeddings of PEFT get the same.

    :func:`tp_embed.shard_embeddings` calls it. Doing it twice does no harm.
    """
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel) and has_shards(module):
            give_class(module, ResizesShards, SavesShards)
    if _has_peft(model):
        from .lora import adapt_lora  # An optional dependency, which is there.

        adapt_lora(model)


def check_adapters(model: Module, tables: Collection[Module]) -> None:
    """Checks that what others have put around ``tables`` of ``model``, or in the place of its
    ``forward``, works on shards of them."""
    check_forward(model, tables)
    if _has_peft(model):
        from . import lora

        lora.check_adapters(model, tables)


def _has_peft(model: Module) -> bool:
    return any(type(module).__module__.startswith("peft.") for module in model.modules())
