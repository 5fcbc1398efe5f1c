"""What one rank holds with DeepSpeed's AutoTP `alone`, and with tables sharded by tp_embed.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/memory.py alone|embed|vocab

Trains a one-layer Llama (V=128k, E=1024, untied, fp32, ZeRO 1, AdamW) for two steps, and prints the
bytes of the token table with what belongs to it (gradient, master copy, two moments), counted from
the engine's tensors, and the growth of the process's resident memory. One job for each, since a
process does not give back what an engine took.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from deepspeed.utils import safe_get_full_optimizer_state as state
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed import shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang

VOCAB, DIM = 128_000, 1024


def measure(strategy: str | None) -> tuple[int, int]:
    """(bytes of the table, its gradient, master copy and moments; growth of the RSS)."""
    before = psutil.Process().memory_info().rss
    engine = build(strategy)
    for step in range(2):
        ids = torch.arange(64).view(1, 64) + step
        # The logits of one position: those of all would dwarf what is measured.
        loss = engine(input_ids=ids, logits_to_keep=1).logits.float().norm()
        if step == 1:
            engine.backward(loss)
            table = engine.module.get_input_embeddings().weight
            kept = [table.data, safe_get_full_grad(table)]
            engine.step()
            kept += [safe_get_full_fp32_param(table)]
            kept += [state(table, name) for name in ("exp_avg", "exp_avg_sq")]
        else:
            engine.backward(loss)
            engine.step()
    total = sum(tensor.nbytes for tensor in kept)
    growth = psutil.Process().memory_info().rss - before
    return total, growth


def build(strategy: str | None) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config)
    gang = DeepSpeedGang.from_groups(tp_size=dist.get_world_size())
    if strategy:
        shard_embeddings(model, gang, strategy=strategy)  # type: ignore[arg-type]
    gc.collect()
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "tensor_parallel": {"autotp_size": dist.get_world_size()},
        },
    )
    return engine


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    name = sys.argv[1]
    table, growth = measure(None if name == "alone" else name)
    if dist.get_rank() == 0:
        print(f"{name}: table {table / 2**20:.0f} MiB, process {growth / 2**20:.0f} MiB")
