"""Makes `shard_embeddings()` check and adapt models of transformers."""

from __future__ import annotations

import sys
from collections.abc import Collection

from torch.nn import Module

from tp_embed.surgery.adapters import ADAPTERS


class _TransformersAdapter:
    """Adapts models of transformers, which save and resize tables themselves: they would save one
    shard."""

    def check(self, model: Module, tables: Collection[Module]) -> None:
        if _has_models():
            from .classes import check_adapters

            check_adapters(model, tables)

    def adapt(self, model: Module) -> None:
        if _has_models():
            from .classes import adapt

            adapt(model)


def _has_models() -> bool:
    """Returns whether there may be models; ``import transformers`` alone does not load this slow
    module."""
    return "transformers.modeling_utils" in sys.modules


ADAPTERS.append(_TransformersAdapter())
