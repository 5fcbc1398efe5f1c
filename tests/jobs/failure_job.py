"""Run by a launcher for test_failure.py: trains a model until something happens to its ranks, or
resumes a checkpoint. Each rank appends its steps to its own file, and logs.

    failure_job.py DIRECTORY timeout=SECONDS [load=CHECKPOINT] [steps=N]
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from engines_job import AUTOTP, V, build, config
from tp_embed.integrations.deepspeed import initialize

BATCH, SAVED = 2, 4  # Sequences per step; steps before it saves.
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}


def batch(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return list(torch.randint(V, (BATCH, 12), generator=generator))


def train_alone(steps: int) -> list[float]:
    """Trains the same in one process of plain torch."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([model(ids) for ids in batch(step)]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ds_config(tp_size: int, timeout: str | None) -> dict[str, Any]:
    dp_size = dist.get_world_size() // tp_size
    return config(
        optimizer=ADAM,
        gradient_accumulation_steps=BATCH // dp_size,
        tp_embed={"watchdog": {"timeout": float(timeout)}} if timeout else {},
        **(AUTOTP if tp_size > 1 else {}),
    )


def train_step(engine: Any, step: int) -> float:
    """Returns the mean loss of the whole batch."""
    dp_size = engine.dp_world_size
    own = batch(step)[dist.get_rank() // (dist.get_world_size() // dp_size) :: dp_size]
    total = torch.zeros(())
    for ids in own:
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / len(own)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def save(engine: Any, directory: Path, tag: str) -> None:
    """Marks the checkpoint as the latest after all ranks have written it."""
    engine.save_checkpoint(str(directory), tag=tag, save_latest=False)
    if dist.get_rank() == 0:
        (directory / "latest").write_text(tag)


def main(directory: Path, **options: str) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rank = dist.get_rank()
    logging.basicConfig(filename=directory / f"rank{rank}.log")
    ds = ds_config(min(2, dist.get_world_size()), options.get("timeout"))
    engine, *_ = initialize(model=build(), config=ds)
    first = 0
    if checkpoint := options.get("load"):
        engine.load_checkpoint(checkpoint)
        first = engine.global_steps
    with (directory / f"rank{rank}.jsonl").open("a") as file:
        for step in range(first, first + int(options.get("steps", 1_000_000))):
            loss = train_step(engine, step)
            print(json.dumps({"step": step, "loss": loss}), file=file, flush=True)
            if step + 1 == SAVED and not checkpoint:
                save(engine, directory / "checkpoints", f"step{SAVED}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), **dict(option.split("=") for option in sys.argv[2:]))
