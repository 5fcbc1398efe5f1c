"""Measures a rank's memory for a Llama's table and head, with AutoTP alone and with tp_embed.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/memory.py untied-alone untied-auto
    deepspeed --num_gpus 2 --no_local_rank benchmarks/memory.py tied-preset-alone tied-preset-auto

A case is `untied` or `tied`, `preset` where AutoTP cuts by its preset and not by the plan of
transformers, and a strategy or `alone`. Each trains a one-layer Llama for two steps (fp32, ZeRO 1,
AdamW). Prints the bytes of the token table and of the output head, each with its gradient, master
copy and two moments, counted from the engine's tensors, and the growth of the process's resident
memory. For the latter run one case per job, since a process frees little of an engine's memory.
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from deepspeed.utils import safe_get_full_optimizer_state as state
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed.integrations.deepspeed import initialize


def measure(case: str, vocab_size: int, dim: int) -> dict[str, Any]:
    before = psutil.Process().memory_info().rss
    engine = build(case, vocab_size, dim)
    table = engine.module.get_input_embeddings().weight
    head = engine.module.get_output_embeddings().weight
    kept: dict[Parameter, list[torch.Tensor]] = {table: [], head: []}  # A single entry if tied.
    for step in range(2):
        ids = torch.arange(64).view(1, 64) + step
        # The logits of one position: all of them would dwarf the rest.
        loss = engine(input_ids=ids, logits_to_keep=1).logits.float().norm()
        engine.backward(loss)
        if step == 1:
            for parameter, tensors in kept.items():
                tensors += [parameter.data, safe_get_full_grad(parameter)]
        engine.step()
    for parameter, tensors in kept.items():
        tensors += [safe_get_full_fp32_param(parameter)]
        tensors += [state(parameter, name) for name in ("exp_avg", "exp_avg_sq")]
    row = {
        "case": case,
        "table": sum(tensor.nbytes for tensor in kept[table]),
        "head": 0 if head is table else sum(tensor.nbytes for tensor in kept[head]),
        "process": psutil.Process().memory_info().rss - before,
    }
    kept.clear()
    engine.destroy()
    return row


def build(case: str, vocab_size: int, dim: int) -> Any:
    tying, *preset, strategy = case.split("-")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=1,
        num_attention_heads=8,
        tie_word_embeddings=tying == "tied",
    )
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
    }
    if preset:
        ds_config["tensor_parallel"]["preset_model"] = "llama"
    model = LlamaForCausalLM(config)
    if strategy == "alone":
        engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    else:
        ds_config["tp_embed"] = {"strategy": strategy}
        engine, *_ = initialize(model=model, config=ds_config)
    del model
    gc.collect()
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--vocab-size", type=int, default=128_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--json", help="write the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rows = [measure(case, arguments.vocab_size, arguments.dim) for case in arguments.cases]
    if dist.get_rank() == 0:
        for row in rows:
            sizes = ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in row.items() if k != "case")
            print(f"{row['case']}: {sizes}")
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(rows, file)


if __name__ == "__main__":
    main()
