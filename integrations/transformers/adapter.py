"""Has `shard_embeddings()` check and adapt models of transformers."""

from __future__ import annotations

import sys
from collections.abc import Collection

from torch.nn import Module

from tp_embed.surgery.adapters import ADAPTERS


class _TransformersAdapter:
    """Models of transformers save and resize their tables themselves, and would save one shard."""

    def check(self, model: Module, tables: Collection[Module]) -> None:
        if _has_models():
            from .classes import check_adapters

            check_adapters(model, tables)

    def adapt(self, model: Module) -> None:
        if _has_models():
            from .classes import adapt

            adapt(model)


def _has_models() -> bool:
    """``import transformers`` alone does not load the module of the models, which takes a while."""
    return "transformers.modeling_utils" in sys.modules


ADAPTERS.append(_TransformersAdapter())
