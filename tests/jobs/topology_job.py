"""Run by the `deepspeed` launcher on two ranks for test_topology_engines.py: engines whose heads
have the same bits at tensor-parallel sizes 1 and 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from engines_job import mpu_over
from token_values_job import LR, batches, build
from tp_embed.integrations.deepspeed import initialize
from tp_embed.nn import tiles

CASES = [
    (strategy, tied, stage)
    for strategy, tied in [("vocab", True), ("embed", True), ("vocab", False)]
    for stage in (0, 3)
]


def train(mpu: Any, strategy: str, tied: bool, stage: int) -> list[torch.Tensor]:
    config: dict[str, Any] = {
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "zero_allow_untested_optimizer": True,
        "tp_embed": {"strategy": strategy, "head_deterministic": "topology"},
    }
    engine, *_ = initialize(model=build(tied), config=config, mpu=mpu)
    losses = []
    for ids in batches():
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    tiles._TILE = 8
    mpus = {1: mpu_over([[0], [1]]), 2: mpu_over([[0, 1]])}
    seen = {(size, *case): train(mpu, *case) for case in CASES for size, mpu in mpus.items()}
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
