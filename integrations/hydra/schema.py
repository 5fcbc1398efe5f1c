"""Schemas of a training config, so that misspelt keys and values of a wrong type are errors.

The dataclasses give types and meanings, the files in ``configs/`` give values.
"""

# ruff: noqa: RUF009 (`_key` is `dataclasses.field`)

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


def _key(meaning: str) -> Any:
    """Declares a key of a config file, with its meaning for the reference."""
    return field(default=MISSING, metadata={"meaning": meaning})


class Strategy(Enum):
    """The strategies of :func:`tp_embed.shard_embeddings`."""

    auto = "auto"
    embed = "embed"
    vocab = "vocab"
    world = "world"
    none = "none"


class Placement(Enum):
    """Which rows a rank holds of a table over all ranks."""

    block = "block"
    cyclic = "cyclic"


class TableOptimizer(Enum):
    """The optimizers of :mod:`tp_embed.optim`."""

    lazy_adam = "lazy_adam"
    rowwise_adagrad = "rowwise_adagrad"
    rowwise_adam = "rowwise_adam"


class Output(Enum):
    """The layouts of an embedding's output."""

    replicated = "replicated"
    sequence = "sequence"
    shard = "shard"


class FuseLoss(Enum):
    """Whether to compute the loss from hidden states; ``always``: in evaluation, too."""

    never = False
    training = True
    always = "always"


class Dedup(Enum):
    """Whether to send a row once if several positions look it up."""

    auto = "auto"
    always = True
    never = False


@dataclass
class TableConfig:
    """The optimizer of a table that the engine's optimizer doesn't train. Keys that are left out
    have the default of its class."""

    optimizer: TableOptimizer = MISSING
    lr: float | None = None
    betas: list[float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    memory: str | None = None
    resident: int | None = None


@dataclass
class EmbeddingConfig:
    """How to shard and initialize tables, see :func:`tp_embed.shard_embeddings`."""

    strategy: Strategy = _key("the strategy for tables that no rule names")
    rules: dict[str, Strategy] = _key(
        "strategies by patterns of names, such as `*.wpe`; patterns only in files"
    )
    placement: Placement = _key("which rows a rank holds with the strategy `world`")
    output: Output = _key("the layout of the outputs; models need `replicated`")
    dedup: Dedup = _key("whether to send a row once if several positions look it up")
    sparse: bool | None = _key("whether gradients are sparse; null: as before sharding")
    reuse_grad: bool | None = _key(
        "whether to reuse the memory of dense gradients; null: as before sharding"
    )
    check_ids: int | None = _key(
        "ranks compare their ids at every n-th lookup; 0: never, null: every 128th"
    )
    train_rows: dict[str, Any] = _key(
        "the rows that get a gradient, by patterns of names: a list, or a slice such as `32000:`; "
        "patterns only in files"
    )
    tables: dict[str, TableConfig] = _key(
        "optimizers of tables of their own, by patterns of names: `optimizer` (`lazy_adam`, "
        "`rowwise_adagrad` or `rowwise_adam`), `lr`, `betas`, `eps`, `weight_decay`, "
        "`memory`, `resident`; patterns only in files"
    )
    init_fn: Any = _key("the choice of the group `init`; null: tables keep their values")


@dataclass
class HeadConfig:
    """How to shard the output head."""

    tie_head: bool = _key("whether to shard a tied head together with its table")
    shard_head: bool = _key("whether to shard a head with its own weight")
    shard_logits: bool = _key("whether to compute the loss from rank-local logits")
    fuse_loss: FuseLoss = _key("whether to compute the loss from hidden states, without logits")


@dataclass
class ModelConfig:
    """The config of a model of transformers."""

    type: str = _key("the `model_type` of transformers: llama, qwen3, gemma3_text, ...")
    vocab_size: int | None = _key("rows of the table; null: the number of tokens in the data")
    hidden_size: int = _key("the width E of the table")
    intermediate_size: int = _key("the width of the feed-forward layers")
    num_hidden_layers: int = _key("the number of layers")
    num_attention_heads: int = _key("query heads")
    num_key_value_heads: int = _key("key and value heads")
    head_dim: int | None = _key("the width of a head; null: the model's default")
    max_position_embeddings: int = _key("the longest sequence")
    tie_word_embeddings: bool = _key("whether the head shares the table")
    extra: dict[str, Any] = _key("any other keys of the config class")


@dataclass
class DataConfig:
    """The text and the shape of batches."""

    vocab_size: int = _key("the maximum number of tokens in the BPE vocabulary")
    seq_len: int = _key("tokens per sequence")
    batch_size: int = _key("sequences per batch, on each data-parallel rank")
    max_bytes: int | None = _key("how much of the text to read; null: all")
    cache_dir: str = _key("where to cache tokens between runs")


@dataclass
class AdamParams:
    """The parameters of DeepSpeed's ``Adam`` and ``AdamW``."""

    lr: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    torch_adam: bool = MISSING
    adam_w_mode: bool = MISSING


@dataclass
class AdamConfig:
    """The section ``optimizer`` of a DeepSpeed config, for Adam."""

    type: str = MISSING
    params: AdamParams = field(default_factory=AdamParams)


@dataclass
class SGDParams:
    """The parameters of DeepSpeed's ``SGD``."""

    lr: float = MISSING
    momentum: float = MISSING
    weight_decay: float = MISSING


@dataclass
class SGDConfig:
    """The section ``optimizer`` of a DeepSpeed config, for SGD."""

    type: str = MISSING
    params: SGDParams = field(default_factory=SGDParams)


@dataclass
class TrainConfig:
    """A training run: ``train.yaml``."""

    name: str = _key("the name of the run and its directory, `runs/NAME`")
    seed: int = _key("decides the initial model and the batches")
    tp_size: int = _key("tensor-parallel ranks; the others are data-parallel")
    steps: int = _key("optimizer steps")
    lr: float = _key("the learning rate after warm-up")
    eval_batches: int = _key("batches for the validation loss")
    checkpoint_every: int = _key("steps between checkpoints")
    resume: bool = _key("whether to resume from the last checkpoint of this name")
    init: Any = MISSING
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: dict[str, Any] = MISSING
