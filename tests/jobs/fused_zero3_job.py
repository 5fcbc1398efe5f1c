"""Run on two ranks for test_fused_zero3.py: trains a model at ZeRO 3 that computes its loss from
hidden states, and saves its losses and where the weight of the head is whole, by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from fuse_loss_job import STEPS, loop_config, masked_dataset
from hf_models import build
from tp_embed.integrations.deepspeed import initialize
from tp_embed.integrations.transformers import fuse_loss

# Gather as late as possible, and release at once.
LATE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


def train(tp_size: int) -> dict[str, Any]:
    ds_config = loop_config(3)
    ds_config["zero_optimization"] |= LATE
    ds_config["tensor_parallel"] = {"autotp_size": tp_size}
    model = build("llama").train()
    engine, *_ = initialize(model=model, config=ds_config)
    fuse_loss(model)
    weight, seen, losses = model.lm_head.weight, [], []

    def note(*_: object) -> None:
        seen.append(weight.ds_status.name)

    model.model.layers[0].register_forward_pre_hook(note)
    model.lm_head.register_forward_pre_hook(note)
    compute = model.lm_head.loss

    def compute_noted(*args: Any, **options: Any) -> torch.Tensor:
        note()
        loss: torch.Tensor = compute(*args, **options)
        return loss

    model.lm_head.loss = compute_noted
    for row in masked_dataset()[:STEPS]:
        ids, labels = row["input_ids"][None], row["labels"][None]
        loss = engine(input_ids=ids, labels=labels).loss
        note()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return {"losses": losses, "seen": seen}


def main(out: Path, tp_size: int) -> None:
    torch.set_num_threads(1)
    torch.save(train(tp_size), out / f"seen{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    # In a launched process `initialize()` makes the groups.
    main(Path(sys.argv[1]), int(sys.argv[2]))
