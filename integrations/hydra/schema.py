"""What a training config holds, so that a misspelt key or a value of a wrong type is an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class Strategy(Enum):
    """The strategies of :func:`tp_embed.shard_embeddings`."""

    auto = "auto"
    embed = "embed"
    vocab = "vocab"
    none = "none"


@dataclass
class EmbeddingConfig:
    """How tables are sharded and initialised; ``init_fn`` is the choice of the group ``init``."""

    strategy: Strategy = MISSING
    init_fn: Any = None


@dataclass
class ModelConfig:
    """The fields of :class:`transformers.LlamaConfig` that a size is made of."""

    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = MISSING


@dataclass
class DataConfig:
    """The text and how it is cut into batches; sizes are in tokens but ``max_bytes``, which bounds
    the text that is read."""

    vocab_size: int = MISSING
    seq_len: int = MISSING
    batch_size: int = MISSING
    max_bytes: int | None = None
    cache_dir: str = MISSING


@dataclass
class TrainConfig:
    """A training run: ``train.yaml``."""

    name: str = MISSING
    seed: int = MISSING
    tp_size: int = MISSING
    steps: int = MISSING
    lr: float = MISSING
    eval_batches: int = MISSING
    checkpoint_every: int = MISSING
    resume: bool = MISSING
    init: Any = MISSING
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: dict[str, Any] = MISSING


def register_schemas() -> None:
    """Makes the schemas known to Hydra; call it before ``hydra.main`` or ``compose`` runs."""
    ConfigStore.instance().store(name="tp_embed_train", node=TrainConfig, provider="tp_embed")
