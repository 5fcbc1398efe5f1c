"""A small Llama for the tests of engines."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, DIM = 101, 36  # 101 rows do not divide by two ranks; 36 columns do, as the heads need.


def build(
    tied: bool, *, vocab: int = VOCAB, layers: int = 2, seed: int = 0, kind: Any = LlamaForCausalLM
) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return kind(config)
