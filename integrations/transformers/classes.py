"""Classes for models of transformers and PEFT that know of the shards of their tables."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from torch.nn import Module
from transformers import PreTrainedModel

from .forward import check_forward
from .layers import has_shards
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


def give_class(module: Any, *mixins: type) -> None:
    """Makes ``module`` an instance of a class of the name of its own with ``mixins`` before it."""
    if not isinstance(module, mixins):
        base: Any = type(module)
        module.__class__ = _class_with(base, mixins)


@cache
def _class_with(base: type, mixins: tuple[type, ...]) -> type:
    # Much of transformers goes by the name of a class: its losses, its plans, `config.json`.
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_tp_embed_base": (base, mixins),
    }
    return type(base.__name__, (*mixins, base), attributes)


def _reduce(self: Any, protocol: Any) -> Any:
    # pickle looks classes up by their names, and would find the one that this was made from.
    base, mixins = type(self)._tp_embed_base
    _, _, *state = super(type(self), self).__reduce_ex__(protocol)
    return (_new, (base, mixins), *state)


def _new(base: type, mixins: tuple[type, ...]) -> Any:
    made: Any = _class_with(base, mixins)
    return made.__new__(made)
