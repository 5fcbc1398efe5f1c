"""Tensor-parallel embedding tables for DeepSpeed and Megatron-style training.

Names are imported on first use: ``import tp_embed`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tp_embed.batch_layout import BatchLayout
    from tp_embed.gang import FakeGang, Gang, GangError, ReduceOperation
    from tp_embed.gang.process_group import ProcessGroupGang
    from tp_embed.nn.embedding import (
        Embedding,
        RowWiseEmbedding,
        ShardedEmbedding,
        StandardEmbedding,
        VocabShardedEmbedding,
    )
    from tp_embed.nn.head import OutputHead
    from tp_embed.nn.init import blockwise, init_scaled_embedding
    from tp_embed.nn.mapped import MappedTable, map_table
    from tp_embed.nn.ngram import NGramAverage, NGramEmbedding, NGramGate
    from tp_embed.nn.ngram_hash import NGramCache, NGramHash, RollingHash, XorHash
    from tp_embed.parameter.norms import clip_grad_norm_, get_total_norm
    from tp_embed.partition import Partition
    from tp_embed.surgery.carry import shardwise
    from tp_embed.surgery.shard import shard_embeddings

    __version__: str

_MODULE_OF = {
    "BatchLayout": "batch_layout",
    "Embedding": "nn.embedding",
    "FakeGang": "gang.fake",
    "Gang": "gang.base",
    "GangError": "gang.base",
    "MappedTable": "nn.mapped",
    "NGramAverage": "nn.ngram",
    "NGramCache": "nn.ngram_hash",
    "NGramEmbedding": "nn.ngram",
    "NGramGate": "nn.ngram",
    "NGramHash": "nn.ngram_hash",
    "Partition": "partition",
    "ProcessGroupGang": "gang.process_group",
    "ReduceOperation": "gang.base",
    "RollingHash": "nn.ngram_hash",
    "ShardedEmbedding": "nn.embedding",
    "StandardEmbedding": "nn.embedding",
    "OutputHead": "nn.head",
    "RowWiseEmbedding": "nn.embedding",
    "VocabShardedEmbedding": "nn.embedding",
    "XorHash": "nn.ngram_hash",
    "blockwise": "nn.init",
    "clip_grad_norm_": "parameter.norms",
    "get_total_norm": "parameter.norms",
    "init_scaled_embedding": "nn.init",
    "map_table": "nn.mapped",
    "shard_embeddings": "surgery.shard",
    "shardwise": "surgery.carry",
}

__all__ = [
    "BatchLayout",
    "Embedding",
    "FakeGang",
    "Gang",
    "GangError",
    "MappedTable",
    "NGramAverage",
    "NGramCache",
    "NGramEmbedding",
    "NGramGate",
    "NGramHash",
    "OutputHead",
    "Partition",
    "ProcessGroupGang",
    "ReduceOperation",
    "RollingHash",
    "RowWiseEmbedding",
    "ShardedEmbedding",
    "StandardEmbedding",
    "VocabShardedEmbedding",
    "XorHash",
    "blockwise",
    "clip_grad_norm_",
    "get_total_norm",
    "init_scaled_embedding",
    "map_table",
    "shard_embeddings",
    "shardwise",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _version() -> str:
    """Returns the version of the installed package, or "0+unknown" if it isn't installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tp-embed")
    except PackageNotFoundError:
        return "0+unknown"
