"""Run on two ranks for test_hf_sequence.py: a Trainer whose positions are split by Ulysses, with a
fused loss. Saves the losses by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_models import build
from hf_trainer_job import config, dataset, losses
from tp_embed.integrations.transformers import ShardTables

STEPS = 4
CASES = {"untied, ZeRO 1": ("llama", 1), "tied, ZeRO 3": ("tied llama", 3)}


def rows() -> list[dict[str, Tensor]]:
    """Each with another number of labels; a rank has none of the last ones."""
    found = []
    for i, row in enumerate(dataset(STEPS)):
        labels = row["labels"].clone()
        labels[: (0, 3, 7, 10)[i % 4]] = -100
        positions = torch.arange(len(labels))
        found.append({"input_ids": row["input_ids"], "labels": labels, "position_ids": positions})
    return found


def train(name: str, directory: Path, **options: Any) -> list[float]:
    callbacks = options.pop("callbacks", [])
    args = TrainingArguments(
        str(directory),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **options,
    )
    model = build(CASES[name][0], attn_implementation="sdpa")
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=callbacks)
    trainer.train()
    return losses(trainer)


def main(out: Path, name: str) -> None:
    torch.set_num_threads(1)
    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length=12, sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    split = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler)
    found = train(
        name,
        out,
        deepspeed=config(CASES[name][1], tp_size=1),
        parallelism_config=split,
        callbacks=[ShardTables(fuse_loss=True)],
    )
    torch.save(found, out / f"seen{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
