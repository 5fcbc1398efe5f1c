"""A script with the Trainer of transformers and AutoTP.

    deepspeed --num_gpus 2 --no_local_rank examples/train_hf_trainer.py OUTPUT_DIR

The lines that shard its table, and write the whole model, end in `# added`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tp_embed import shard_embeddings  # added
from tp_embed.integrations.deepspeed import DeepSpeedGang, export  # added

VOCAB_SIZE, STEPS = 101, 4

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {"autotp_size": 2},
}


def training_arguments(output_dir: str, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        **options,
    )


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


def dataset() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCAB_SIZE, (2 * STEPS, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def main(output_dir: str) -> None:
    args = training_arguments(output_dir, deepspeed=CONFIG)
    model = build_model()
    print(shard_embeddings(model, DeepSpeedGang.from_groups(tp_size=2)))  # added
    trainer = Trainer(model, args, train_dataset=dataset())
    trainer.train()
    export(trainer.deepspeed, f"{output_dir}/model")  # added
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for step, loss in enumerate(losses, start=1):
            print(f"step {step}: loss {loss:.8f}")


if __name__ == "__main__":
    main(sys.argv[1])
