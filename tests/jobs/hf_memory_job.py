"""Run by torchrun on two ranks for test_hf_memory.py: measures the memory for loading a model with
a large table into shards, and for saving it. Saves the results by rank, in MiB."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from tp_embed import ProcessGroupGang
from tp_embed.integrations.transformers import from_pretrained

V, E = 200_000, 512


def status(key: str) -> float:
    """Returns a figure of the kernel for this process: `VmHWM` is its peak memory, including mapped
    files; `RssAnon` is its current memory without them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    # Return freed buffers of collectives to the kernel (3 is M_MMAP_THRESHOLD).
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
    dist.init_process_group("gloo")
    gang = ProcessGroupGang(None, "cpu")
    small = str(directory / "small")
    # Imports and buffers of collectives at first use.
    from_pretrained(LlamaForCausalLM, small, gang).save_pretrained(directory / "small saved")
    seen: dict[str, dict[str, float]] = {}
    for strategy in ("embed", "vocab"):
        reset_peak()
        before = status("VmRSS")
        model = from_pretrained(
            LlamaForCausalLM, str(directory / "large"), gang, sharding={"strategy": strategy}
        )
        found = {"load": status("VmHWM") - before}
        found["held"] = sum(p.nbytes for p in {*model.parameters()}) / 2**20
        reset_peak()
        before = status("VmRSS")
        model.save_pretrained(directory / strategy)
        found["save"] = status("VmHWM") - before
        seen[strategy] = found
        del model
    torch.save(seen, directory / f"seen{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
