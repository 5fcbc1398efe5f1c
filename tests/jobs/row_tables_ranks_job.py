"""Run by the `deepspeed` launcher on some ranks for test_row_tables_ranks.py: the engines of
row_tables_job.py, where all ranks are tensor-parallel, or all data-parallel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import row_tables_job as job
from engines_job import mpu_over

CASES = [
    (1, "tp", "rowwise_adagrad", "vocab"),
    (2, "tp", "rowwise_adam", "embed"),
    (1, "dp", "lazy_adam", "vocab"),
    (0, "dp", "rowwise_adam", "world"),
    (1, "dp", "rowwise_adagrad", "world"),
    (3, "dp", "lazy_adam", "world"),
]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    ranks = list(range(dist.get_world_size()))
    mpus = {"tp": mpu_over([ranks]), "dp": mpu_over([[rank] for rank in ranks])}
    seen: dict[str, Any] = {f"{each}": job.case(mpus, *each) for each in CASES}
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
