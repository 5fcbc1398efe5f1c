"""What a training config holds, so that a misspelt key or a value of a wrong type is an error.

The dataclasses give types and meanings, the files in ``configs/`` values.
"""

# ruff: noqa: RUF009 (`_key` is `dataclasses.field`)

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


def _key(meaning: str) -> Any:
    """A key of a config file, and what it means."""
    return field(default=MISSING, metadata={"meaning": meaning})


class Strategy(Enum):
    """The strategies of :func:`tp_embed.shard_embeddings`."""

    auto = "auto"
    embed = "embed"
    vocab = "vocab"
    none = "none"


class Output(Enum):
    """The layouts of what an embedding gives."""

    replicated = "replicated"
    sequence = "sequence"
    shard = "shard"


class Dedup(Enum):
    """Whether a row is sent once that several positions want."""

    auto = "auto"
    always = True
    never = False


@dataclass
class EmbeddingConfig:
    """How tables are sharded and initialised, see :func:`tp_embed.shard_embeddings`."""

    strategy: Strategy = _key("what becomes of a table that no rule names")
    rules: dict[str, Strategy] = _key(
        "strategies by patterns of names, such as `*.wpe`; patterns only in files"
    )
    output: Output = _key("the layout of what the embeddings give; models want `replicated`")
    dedup: Dedup = _key("whether a row is sent once that several positions want")
    sparse: bool | None = _key("whether gradients are sparse; null: where they were")
    reuse_grad: bool | None = _key(
        "whether dense gradients are put into the same memory; null: where they were"
    )
    check_ids: int | None = _key(
        "ranks compare their ids at each n-th lookup; 0: never, null: each 128th"
    )
    train_rows: dict[str, Any] = _key(
        "the rows that get a gradient, by patterns of names: a list, or a slice such as `32000:`; "
        "patterns only in files"
    )
    init_fn: Any = _key("the choice of the group `init`; null: tables keep their values")


@dataclass
class HeadConfig:
    """How the output head is treated."""

    tie_head: bool = _key("whether a head that shares its table is sharded, and the table with it")
    shard_head: bool = _key("whether a head with a weight of its own is sharded")
    shard_logits: bool = _key("whether the loss is computed from the logits of each rank")


@dataclass
class ModelConfig:
    """The config of a model of transformers, of which a size is made."""

    type: str = _key("the `model_type` of transformers: llama, qwen3, gemma3_text, ...")
    vocab_size: int | None = _key("classes; null: the tokens of the data")
    hidden_size: int = _key("the width E of the table")
    intermediate_size: int = _key("the width of the feed-forward layers")
    num_hidden_layers: int = _key("layers")
    num_attention_heads: int = _key("heads of queries")
    num_key_value_heads: int = _key("heads of keys and values")
    head_dim: int | None = _key("the width of a head; null: what the model takes by default")
    max_position_embeddings: int = _key("the longest sequence")
    tie_word_embeddings: bool = _key("whether the head shares the table")
    extra: dict[str, Any] = _key("any other keys of the config class")


@dataclass
class DataConfig:
    """The text and how it is cut into batches."""

    vocab_size: int = _key("tokens of the BPE, at most")
    seq_len: int = _key("tokens of a sequence")
    batch_size: int = _key("sequences of a batch, on each data-parallel rank")
    max_bytes: int | None = _key("how much of the text is read; null: all")
    cache_dir: str = _key("where tokens are kept between runs")


@dataclass
class AdamParams:
    """What DeepSpeed's ``Adam`` and ``AdamW`` take."""

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
    """What DeepSpeed's ``SGD`` takes."""

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

    name: str = _key("the run, and its directory `runs/NAME`")
    seed: int = _key("decides the initial model and the batches")
    tp_size: int = _key("tensor-parallel ranks; the others are data-parallel")
    steps: int = _key("steps of the optimizer")
    lr: float = _key("the learning rate after warm-up")
    eval_batches: int = _key("batches that the validation loss is taken of")
    checkpoint_every: int = _key("steps between checkpoints")
    resume: bool = _key("whether to go on from the last checkpoint of this name")
    init: Any = MISSING
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: dict[str, Any] = MISSING
