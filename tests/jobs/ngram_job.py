"""Run by the `deepspeed` launcher on four ranks for test_ngram_engines.py: engines of models with
n-gram and per-layer tables. Saves what was seen, by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Qwen4ExpForCausalLM,
    Qwen4ExpTextConfig,
)

from engines_job import mpu_over
from tp_embed import NGramAverage, NGramEmbedding, RollingHash
from tp_embed.integrations.deepspeed import initialize

V, EOS, STEPS, CLIP, LR, EPS, TABLE_LR = 53, 2, 4, 0.1, 0.005, 1e-3, 0.05

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "use_cache": False,
    "eos_token_id": EOS,
}
PER_LAYER: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": 48,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
}

# The parts of tensor-parallel plans of transformers that DeepSpeed has a style for.
ATTENTION = [
    {"patterns": [r".*self_attn\.[qkv]_proj\.weight$"], "partition_type": "column"},
    {"patterns": [r".*self_attn\.o_proj\.weight$"], "partition_type": "row"},
    {
        "patterns": [r".*self_attn\.[qk]_norm\.weight$"],
        "partition_type": "skip",
        "grad_allreduce": True,
    },
]
MLP = [
    {"patterns": [r".*mlp\.(gate|up)_proj\.weight$"], "partition_type": "column"},
    {"patterns": [r".*mlp\.down_proj\.weight$"], "partition_type": "row"},
]
# The first layers of Gemma 3n look at the mean and the deviation of all of `gate_proj`.
SPARSE_MLP = [{"patterns": [r".*layers\.0\.mlp\..*"], "partition_type": "skip"}]
QWEN = [
    {"patterns": [r".*shared_expert\.(gate|up)_proj\.weight$"], "partition_type": "column"},
    {"patterns": [r".*shared_expert\.down_proj\.weight$"], "partition_type": "row"},
    {
        "patterns": [r".*linear_attn\.(in_proj_\w+|out_proj)\.weight$"],
        "partition_type": "column",
        "gather_output": True,
    },
]


class Averaging(nn.Module):
    """A model with n-grams of ours."""

    def __init__(self) -> None:
        super().__init__()
        hashing = RollingHash(V, 2 * V, max_ngram=3, heads=2, boundary=EOS)
        self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V)
        self.ngram = NGramAverage(NGramEmbedding(hashing, 4), 16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.head(self.ngram(self.embed(input_ids), input_ids).tanh())
        targets = labels[:, 1:].flatten()
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)}


def qwen() -> Any:
    return Qwen4ExpForCausalLM(
        Qwen4ExpTextConfig(
            **SIZES,
            layer_types=["linear_attention", "indexed_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            hc_count=2,
            hc_lowrank=8,
            ple_layer_ids=[1],
            heads_per_ngram=2,
            ngram_vocab_size_base=60,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=8,
            indexer_compress_ratio=4,
        )
    )


def gemma3n() -> Any:
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **PER_LAYER,
            laurel_rank=4,
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        )
    )


def gemma4() -> Any:
    return Gemma4ForCausalLM(Gemma4TextConfig(**PER_LAYER, global_head_dim=16))


MODELS: dict[str, Any] = {
    "ours": Averaging,
    "qwen": qwen,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
}
SPECS = {"qwen": QWEN, "gemma3n": [*SPARSE_MLP, *ATTENTION, *MLP], "gemma4": [*ATTENTION, *MLP]}
TABLES = {
    "ours": "ngram.ngrams.table",
    "qwen": "model.layers.0.ple.ple_embedding.ngram_embedding",
    "gemma3n": "model.embed_tokens_per_layer",
    "gemma4": "model.embed_tokens_per_layer",
}

# A model, the ZeRO stage, the strategy of the large table, and its optimizer.
CASES: list[tuple[str, int, str, str | None]] = [
    ("ours", 0, "world", None),
    ("ours", 1, "world", "rowwise_adagrad"),
    ("ours", 3, "world", "rowwise_adam"),
    ("qwen", 0, "world", None),
    ("qwen", 1, "embed", None),
    ("qwen", 1, "world", "rowwise_adagrad"),
    ("qwen", 3, "world", "rowwise_adam"),
    ("gemma3n", 1, "embed", None),
    ("gemma3n", 0, "world", None),
    ("gemma3n", 3, "vocab", "rowwise_adagrad"),
    ("gemma4", 1, "embed", None),
    ("gemma4", 2, "world", "rowwise_adam"),
    ("gemma4", 3, "vocab", None),
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]().train()
    with torch.no_grad():
        for parameter in model.parameters():  # Zero at first are some convolutions.
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def replicas(name: str) -> int:
    """The number of data-parallel ranks: by AutoTP, two ranks share a batch."""
    return 2 if name in SPECS else 4


def batches(replica: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(replica)
    ids = torch.randint(3, V, (STEPS, 2, 12), generator=generator)
    ids[:, 0, 5] = EOS
    return list(ids)


def config(name: str, stage: int, strategy: str, optimizer: str | None) -> dict[str, Any]:
    table = TABLES[name]
    section: dict[str, Any] = {"rules": {table: strategy}}
    if optimizer is not None:
        section["tables"] = {table: {"optimizer": optimizer, "lr": TABLE_LR, "eps": EPS}}
    parallel: dict[str, Any] = {}
    if name in SPECS:
        partition = {"use_default_specs": False, "layer_specs": SPECS[name]}
        parallel["tensor_parallel"] = {"autotp_size": 2, "partition_config": partition}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "torch_adam": True}},
        "tp_embed": section,
        **parallel,
    }


def case(mpu: Any, name: str, *options: Any) -> dict[str, Any]:
    mpu = None if name in SPECS else mpu
    engine, *_ = initialize(model=build(name), config=config(name, *options), mpu=mpu)
    losses, norms = [], []
    for ids in batches(dist.get_rank() // (4 // replicas(name))):
        loss = engine(input_ids=ids, labels=ids)["loss"]
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    table = engine.module.get_submodule(TABLES[name])
    return {
        "losses": losses,
        "norms": norms,
        "kind": type(table).__name__,
        "cut": sorted(n for n, m in engine.module.named_modules() if _is_cut(m)),
    }


def _is_cut(module: nn.Module) -> bool:
    return type(module).__module__ == "deepspeed.module_inject.layers"


def by_the_plan(name: str) -> str | float:
    """What DeepSpeed says of the plan of transformers without our tables, or the first loss."""
    ds_config = config(name, 1, "embed", None)
    del ds_config["tensor_parallel"]["partition_config"], ds_config["tp_embed"]
    try:
        engine, *_ = deepspeed.initialize(model=build(name), config=ds_config)
    except ValueError as e:
        return str(e)
    ids = batches(0)[0]
    return float(engine(input_ids=ids, labels=ids)["loss"])


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    alone = mpu_over([[rank] for rank in range(4)])
    seen: dict[str, Any] = {f"{each}": case(alone, *each) for each in CASES}
    seen["by the plan"] = {name: by_the_plan(name) for name in SPECS}
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
