"""Run on several nodes by several launchers for test_nodes.py, and on one node for comparison.

    node_job.py OUT save CHECKPOINT
    node_job.py OUT resume CHECKPOINT ...

Trains a small model with tensor parallelism across the nodes; and, on four ranks, a Llama with
tensor parallelism inside the nodes and data parallelism across them, which saves midway, or
resumes there from checkpoints of other runs. Saves the results of each rank in OUT.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups

import engines_job
import llama
from tp_embed.integrations.deepspeed import initialize
from tp_embed.launch.environment import find_place

STEPS, LR = 4, 1e-2  # Saves a checkpoint after half of them.


def batches(dp_rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dp_rank)
    return list(torch.randint(llama.VOCAB, (STEPS, 2, 8), generator=generator))


def llama_engine(seed: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "tensor_parallel": {"autotp_size": 2},
        "tp_embed": {"strategy": "vocab", "shard_logits": True},
    }
    return initialize(model=llama.build(tied=True, seed=seed), config=config)[0]


def train(engine: Any, ids: list[torch.Tensor]) -> list[float]:
    losses = []
    for batch in ids:
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def inside(mode: str, checkpoints: list[str]) -> dict[str, list[Any]]:
    """Returns the losses of this rank's batches."""
    engine = llama_engine(seed=0)
    ids = batches(groups.get_data_parallel_rank())
    first, second = ids[: STEPS // 2], ids[STEPS // 2 :]
    losses = train(engine, first)
    if mode == "save":
        for directory in checkpoints:
            engine.save_checkpoint(directory, tag="midway")
    losses += train(engine, second)
    resumed = []
    if mode == "resume":
        for seed, directory in enumerate(checkpoints, start=1):
            engine = llama_engine(seed)
            engine.load_checkpoint(directory, tag="midway")
            resumed.append(train(engine, second))
    return {"inside": losses, "resumed": resumed}


def across(nodes: int) -> dict[str, list[Any]]:
    """Trains with a rank of every node in each gang."""
    ranks = range(dist.get_world_size())
    local_size = len(ranks) // nodes
    gangs = [list(ranks[i::local_size]) for i in range(local_size)]
    mpu = engines_job.mpu_over(gangs)
    engine = engines_job.megatron(mpu, stage=1, seed=0)
    losses = []
    for ids in engines_job.batches(mpu.get_data_parallel_rank()):
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"across": losses, "gang": engine.module.embed.gang.global_ranks}


def main(out: Path, mode: str, *checkpoints: str) -> None:
    torch.set_num_threads(1)
    place = find_place()
    place.export()
    deepspeed.init_distributed()
    seen = {"host": socket.gethostname(), "place": asdict(place)}
    seen |= across(nodes=2 if place.size == 4 else place.size)
    if place.size == 4:
        seen |= inside(mode, list(checkpoints))
    (out / f"{place.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
