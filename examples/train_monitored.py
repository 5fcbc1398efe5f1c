"""Monitors tables while they train on a DeepSpeed engine.

    deepspeed --num_gpus 2 --no_local_rank examples/train_monitored.py runs/monitored

Writes `tensorboard/`, `monitor.jsonl` and `report.html` to the directory, and prints the figures of
DeepSpeed and TensorBoard. The lines that monitor the tables end in `# added`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed.integrations.deepspeed import initialize
from tp_embed.integrations.deepspeed.monitor import EngineMonitor  # added
from tp_embed.monitor import write_report  # added

VOCAB_SIZE, STEPS = 2000, 20


def make_config(directory: Path) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "tensor_parallel": {"autotp_size": 2},
        "tensorboard": {
            "enabled": True,
            "output_path": str(directory),
            "job_name": "tensorboard",
        },
        "comms_logger": {"enabled": True, "prof_all": True},
        "wall_clock_breakdown": True,
    }


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def batch(generator: torch.Generator) -> torch.Tensor:
    """Draws ids; a few are frequent, as in text. *Shape:* (4, 64)."""
    return (VOCAB_SIZE * torch.rand(4, 64, generator=generator) ** 4).long()


def main(directory: Path) -> None:
    engine, *_ = initialize(model=build_model(), config=make_config(directory))
    monitor = EngineMonitor(engine, every=2, directory=directory)  # added
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        ids = batch(generator).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    for _ in range(STEPS - 1):
        step()
    with profile() as profiler:
        step()

    summary = deepspeed.comm.log_summary(return_dict=True)["summary"]  # All ranks take part.
    if dist.get_rank() == 0:
        print(f"report: {write_report(directory)}")  # added
        show(directory, engine, summary, profiler)
    monitor.close()  # added


def show(directory: Path, engine: Any, summary: dict[str, Any], profiler: profile) -> None:
    print("\nTensorBoard, first and last:")
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        print(f"  {tag:62} {scalars[0].value:12.6g} {scalars[-1].value:12.6g}")

    print("\ncomms_logger, calls and bytes of a call:")
    for name, sizes in summary.items():
        if name.startswith("tp_embed."):
            for size, entry in sizes.items():
                print(f"  {name:26} {entry['count']:4} x {size:7}")

    print("\nwall-clock breakdown of the last step:")
    for name, milliseconds in engine.get_wall_clock_timers().items():
        print(f"  {name:26} {milliseconds:9.2f} ms")

    print("\nprofiler, calls in the last step:")
    for event in profiler.key_averages():
        if event.key.startswith("tp_embed."):
            print(f"  {event.key:26} {event.count:4}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/monitored"))
