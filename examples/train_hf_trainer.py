"""Trains with the Trainer of transformers and AutoTP.

    deepspeed --num_gpus 2 --no_local_rank examples/train_hf_trainer.py OUTPUT_DIR

The lines that shard its table end in `# added`. Saves checkpoints that `from_pretrained` loads,
resumes from the last one if there is any, and takes the best one at the end.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tp_embed.integrations.transformers import ShardTables  # added

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
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
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
    shards = ShardTables()  # added
    trainer = Trainer(
        build_model(),
        args,
        train_dataset=dataset(),
        eval_dataset=dataset()[:4],
        callbacks=[shards],  # added
    )
    print(shards.report)  # added
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir))
    trainer.save_model(f"{output_dir}/model")
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            for name in ("loss", "eval_loss"):
                if name in entry:
                    print(f"step {entry['step']}: {name} {entry[name]:.8f}")


if __name__ == "__main__":
    main(sys.argv[1])
