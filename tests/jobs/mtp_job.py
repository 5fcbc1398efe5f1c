"""Run on two ranks for test_mtp_engines.py: trains models with several heads over one table, and
saves the results by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from engines_job import mpu_over
from mtp_models import MODELS, batches, build
from tp_embed.integrations.deepspeed import initialize

STEPS, LR, CLIP = 3, 0.05, 0.3

CASES: dict[str, dict[str, Any]] = {
    f"{name}, ZeRO {stage}": {"name": name, "stage": stage}
    for name in MODELS
    for stage in (0, 1, 2, 3)
    if "biases" not in name
}


def train_alone(name: str) -> list[float]:
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses = []
    for ids in batches(STEPS):
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(mpu: Any, name: str, stage: int) -> list[float]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "weight_decay": 0.01, "torch_adam": True},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "tp_embed": {"strategy": "vocab"},
    }
    engine, *_ = initialize(model=build(name), config=config, mpu=mpu)
    losses = []
    for ids in batches(STEPS):
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    mpu = mpu_over([[0, 1]])
    seen = {name: train(mpu, **case) for name, case in CASES.items()}
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
