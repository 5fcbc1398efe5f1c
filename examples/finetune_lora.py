"""Trains LoRA on a model that loads straight into shards.

    deepspeed --num_gpus 2 --no_local_rank examples/finetune_lora.py MODEL_DIR ADAPTER_DIR

No rank ever holds a whole table. The adapter covers the table, too, and plain PEFT loads it. Writes
a small model to MODEL_DIR if it has none.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed import clip_grad_norm_
from tp_embed.integrations.deepspeed import DeepSpeedGang
from tp_embed.integrations.transformers import from_pretrained, get_peft_model

VOCAB_SIZE, STEPS = 101, 4

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {
        "autotp_size": 2,
        # AutoTP does not support LoRA, so let it cut only layers without adapters.
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [r".*(gate|up)_proj\.weight$"], "partition_type": "column"},
                {"patterns": [r".*down_proj\.weight$"], "partition_type": "row"},
            ],
        },
    },
}


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def add_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(VOCAB_SIZE, (STEPS, 2, 16), generator=generator))


def train(model: Any, optimizer: Any) -> list[float]:
    """Trains on an engine or, for comparison, in plain torch."""
    losses = []
    model.train()
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        if isinstance(model, deepspeed.DeepSpeedEngine):
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def main(model_dir: str, adapter_dir: str) -> None:
    gang = DeepSpeedGang.from_groups(tp_size=2)
    if dist.get_rank() == 0 and not Path(model_dir).exists():
        build_model().save_pretrained(model_dir)
    dist.barrier()

    torch.manual_seed(0)
    base = from_pretrained(LlamaForCausalLM, model_dir, gang)
    model = add_lora(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    for step, loss in enumerate(train(engine, optimizer), start=1):
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.8f}")
    model.save_pretrained(adapter_dir, state_dict=engine._consolidated_16bit_state_dict())


if __name__ == "__main__":
    main(*sys.argv[1:])
