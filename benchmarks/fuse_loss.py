"""Measures the memory of a training step of models of transformers with a sharded head, by what
becomes of the logits: fused, rank-local, or whole.

    torchrun --nproc-per-node 2 benchmarks/fuse_loss.py [--markdown docs/transformers.md]

Prints the largest growth of a rank's memory in forward and backward, gradients included, in MiB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from machine import forget_peak, peak
from pages import insert
from tp_embed import Gang, ProcessGroupGang, shard_embeddings
from tp_embed.integrations.transformers import fuse_loss, shard_logits

BEGIN = "<!-- The table of benchmarks/fuse_loss.py: -->"
END = "<!-- End of the table. -->"
BATCH, LENGTH, LAYERS = 2, 512, 1

# Classes by model types; most have their sizes under the same names.
MODELS = {
    "bart": "BartForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "cohere": "CohereForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "t5": "T5ForConditionalGeneration",
}
WAYS: dict[str, Callable[[Any], None]] = {
    "fused": fuse_loss,
    "`shard_logits`": shard_logits,
    "whole logits": lambda model: None,
}


def build(model_type: str, vocab_size: int, dim: int) -> Any:
    common = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": dim // 4,
    }
    others: dict[str, dict[str, Any]] = {
        "bart": {"d_model": dim, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
        | {"encoder_ffn_dim": 2 * dim, "decoder_ffn_dim": 2 * dim}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        "gpt2": {"n_embd": dim, "n_layer": LAYERS, "n_head": 4},
        "opt": sizes | {"ffn_dim": 2 * dim, "word_embed_proj_dim": dim},
        "t5": {"d_model": dim, "d_kv": dim // 4, "d_ff": 2 * dim, "num_layers": LAYERS}
        | {"num_heads": 4, "decoder_start_token_id": 0},
    }
    config = CONFIG_MAPPING[model_type](**common, **others.get(model_type, sizes))
    torch.manual_seed(0)
    return getattr(transformers, MODELS[model_type])(config).train()


def measure(gang: Gang, model: Any, way: Callable[[Any], None], vocab_size: int) -> str:
    """Returns MiB, or a dash if the model has no such way."""
    rules: dict[str, Any] = {"*embed_positions": "none"}
    has_positions = any(name.endswith("embed_positions") for name, _ in model.named_modules())
    shard_embeddings(model, gang, strategy="vocab", rules=rules if has_positions else {})
    try:
        way(model)
    except ValueError:
        return "-"
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (BATCH, LENGTH), generator=generator)
    few = ids[:, :4].contiguous()
    model(input_ids=few, labels=few).loss.backward()  # To warm up.
    model.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # Else one way reuses memory of another.
    forget_peak()
    before = peak()
    model(input_ids=ids, labels=ids).loss.backward()
    grown = torch.tensor((peak() - before) / 1024)
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    return f"{grown.item():.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # Return freed buffers to the kernel (3 is M_MMAP_THRESHOLD).
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
    dist.init_process_group("gloo")
    gang = ProcessGroupGang(None, "cpu")
    vocab_size, dim = arguments.vocab_size, arguments.dim
    lines = [f"| | {' | '.join(WAYS)} |", "|---|" + "---|" * len(WAYS)]
    for name in arguments.models:
        found = [
            measure(gang, build(name, vocab_size, dim), way, vocab_size) for way in WAYS.values()
        ]
        lines.append(f"| `{MODELS[name]}` | {' | '.join(found)} |")
        if gang.rank == 0:
            print(lines[-1], flush=True)
    if gang.rank == 0 and arguments.markdown:
        insert(arguments.markdown, BEGIN, END, "\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
