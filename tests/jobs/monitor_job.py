"""Run by the `deepspeed` launcher on four ranks for test_monitor_engines.py: monitors engines at
all ZeRO stages. Saves the results of the first rank."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pipeline_job
from tp_embed import GangError
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from tp_embed.integrations.deepspeed.monitor import EngineMonitor

V, E, LENGTH, STEPS, MICRO_BATCHES, LR = 23, 10, 12, 4, 2, 0.1
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}

# ZeRO stage, strategy, and more of the config.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero0": (0, "embed", {}),
    "zero1": (1, "vocab", {}),
    "zero2": (2, "embed", {}),
    "zero3": (3, "embed", {}),
    "zero3-vocab": (3, "vocab", {}),
    "bf16": (1, "embed", BF16),
    "offload": (2, "vocab", OFFLOAD),
    "whole tables": (1, "none", {}),
}


class Model(nn.Module):
    """A sharded table, a whole table, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, E)
        self.positions = nn.Embedding(LENGTH, E)
        self.up = nn.Linear(E, 2 * E)
        self.down = nn.Linear(2 * E, E)
        self.head = nn.Linear(E, V)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.numel(), device=ids.device))
        return cross_entropy(self.head(x + self.down(self.up(x).tanh()))[:-1], ids[1:])

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def batches(dp_rank: int) -> Tensor:
    """*Shape:* (steps, micro batches, length)."""
    generator = torch.Generator().manual_seed(dp_rank)
    return torch.randint(V, (STEPS, MICRO_BATCHES, LENGTH), generator=generator)


def config(stage: int, strategy: str, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.1,
        "steps_per_print": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {
                "use_default_specs": False,
                "layer_specs": [
                    {"patterns": [r"up\.weight$"], "partition_type": "column"},
                    {"patterns": [r"down\.weight$"], "partition_type": "row"},
                ],
            },
        },
        "tp_embed": {"strategy": strategy, "rules": {"positions": "none"}},
        "tensorboard": {"enabled": True, "output_path": str(out), "job_name": "tb"},
        "csv_monitor": {"enabled": True, "output_path": str(out), "job_name": "csv"},
        **more,
    }


def train(engine: Any) -> None:
    engine.train()
    for step in batches(dist.get_rank() // 2):
        for ids in step:
            engine.backward(engine(ids))
            engine.step()
        with torch.no_grad():
            engine.eval()
            engine(step[0])  # Part of no step.
            engine.train()


def train_pipeline() -> list[dict[str, Any]]:
    """Trains two stages that share the table, over two tensor-parallel ranks."""
    topology = PipeModelDataParallelTopology(2, 2, 1)
    gang = DeepSpeedGang.from_mpu(PipelineParallelGrid(topology))
    case = pipeline_job.CASES["tied, ZeRO 1"]
    engine = pipeline_job.start(pipeline_job.pipeline(gang, topology), case["stage"], case["clip"])
    monitor = EngineMonitor(engine, every=2)
    batches = pipeline_job.micro_batches()
    for _ in range(2):
        engine.train_batch(batches)
    monitor.close()
    return monitor.rows


def refusal(call: Any) -> str:
    try:
        call()
    except (GangError, ValueError) as e:
        return str(e)
    return ""


def main(out: Path) -> None:
    deepspeed.init_distributed()
    seen: dict[str, Any] = {}
    for name, (stage, strategy, more) in CASES.items():
        ds_config = config(stage, strategy, out / name, **more)
        engine, *_ = initialize(model=build(), config=ds_config)
        monitor = EngineMonitor(engine, every=1, directory=out / name)
        train(engine)
        monitor.close()
        seen[name] = {"rows": monitor.rows}

    # The last engine, at step 4.
    monitors = [EngineMonitor(engine, every=every) for every in (1, 2)]
    for monitor in monitors:
        train(engine)
        monitor.close()
    train(engine)
    seen["two monitors"] = [[row["step"] for row in monitor.rows] for monitor in monitors]

    seen["pipeline"] = {"rows": train_pipeline()}

    timed = config(
        1, "embed", out / "timed", wall_clock_breakdown=True, comms_logger={"enabled": True}
    )
    # All messages have the same size.
    timed["tp_embed"] |= {"dedup": False, "check_ids": False}
    engine, *_ = initialize(model=build(), config=timed)
    monitor = EngineMonitor(engine)
    train(engine)
    # The same through DeepSpeed's function, to compare the logs.
    deepspeed.comm.all_gather_into_tensor(
        torch.zeros(2 * LENGTH, E // 2),
        torch.zeros(LENGTH, E // 2),
        group=engine.mpu.get_tensor_model_parallel_group(),
    )
    summary = deepspeed.comm.log_summary(return_dict=True)["summary"]
    deepspeed.comm.configure(enabled=False)
    seen["timed"] = {
        "rows": monitor.rows,
        "timers": engine.get_wall_clock_timers(),
        "comms": {name: {int(k): v["count"] for k, v in x.items()} for name, x in summary.items()},
    }
    if dist.get_rank() == 0:
        seen["alone"] = refusal(lambda: EngineMonitor(engine, timeout=timedelta(seconds=2)))
    dist.barrier()
    robin = config(1, "embed", out / "robin")
    robin["zero_optimization"]["round_robin_gradients"] = True
    engine, *_ = initialize(model=build(), config=robin)
    seen["round_robin"] = refusal(lambda: EngineMonitor(engine))
    if dist.get_rank() == 0:
        (out / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
