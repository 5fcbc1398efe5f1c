"""Small models for the tests of the integration with transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

V, E = 37, 16


def small_sizes(layers: int) -> dict[str, Any]:
    """Returns the sizes for most configs."""
    return {
        "vocab_size": V,
        "hidden_size": E,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def small_models(layers: int) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Returns classes of models, their configs and sizes, by name."""
    sizes = small_sizes(layers)
    gpt2 = {
        "vocab_size": V,
        "n_embd": E,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return {
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**sizes, "tie_word_embeddings": False}),
        "tied llama": ("LlamaForCausalLM", "LlamaConfig", {**sizes, "tie_word_embeddings": True}),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**sizes, "tie_word_embeddings": True}),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", sizes),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt2),
    }


MODELS = small_models(layers=1)


def build(name: str, **options: Any) -> Any:
    """Builds one of :data:`MODELS`, always the same."""
    torch.manual_seed(0)
    model_class, config_class, sizes = MODELS[name]
    config = getattr(transformers, config_class)(**{**sizes, **options})
    return getattr(transformers, model_class)(config).eval()


def ids() -> torch.Tensor:
    return torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids()).logits
    return found
