"""Checks the resources of a node: devices, cores, shared memory, open files."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .findings import Finding, differing, odd_ones
from .job import Job

MIB = 2**20

# Bytes in /dev/shm per rank: two pairs of buffers of DeepSpeed's CPU collectives
# (csrc/cpu/comm/shm.cpp), or NCCL's buffers between the GPUs of a node.
SHM_OF_RANK = {"cpu": 66 * MIB, "cuda": 34 * MIB}

_FILES = 4096


def look() -> dict[str, Any]:
    """Collects the devices, the memory and the limits of this rank's machine."""
    try:
        shm = shutil.disk_usage("/dev/shm").free
    except OSError:
        shm = 0
    return {
        "device": device_type(),
        "devices": device_names(),
        "has_idle_gpus": device_type() == "cpu" and has_gpus_for_torch(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "shm": shm,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }


def device_type() -> str:
    """Returns the type of device that ranks compute on: ``cpu`` or ``cuda``."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return "cuda"


def has_gpus_for_torch() -> bool:
    """Returns whether this node has GPUs, and DS_ACCELERATOR does not exclude them."""
    there = any(Path("/dev").glob("nvidia[0-9]*"))
    return there and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_names() -> list[str]:
    """Names the accelerators that this process sees."""
    if device_type() == "cpu":
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def judge(job: Job) -> Iterator[Finding]:
    """Yields findings on devices, memory and limits."""
    parts, places = job.part("machine"), job.part("place")
    kinds = {rank: part["device"] for rank, part in parts.items()}
    if len(set(kinds.values())) > 1:
        yield Finding(
            "error",
            "machine",
            f"ranks compute on different devices: {differing(kinds)}",
            odd_ones(kinds),
            "check the driver (`nvidia-smi`), CUDA_VISIBLE_DEVICES and DS_ACCELERATOR there",
        )
    for rank, part in parts.items():
        yield from _judge_devices(rank, part, places[rank]["local_rank"])
    names = {rank: " and ".join(sorted(set(part["devices"]))) for rank, part in parts.items()}
    if len(set(names.values())) > 1 and len(set(kinds.values())) == 1:
        yield Finding(
            "warning",
            "machine",
            f"ranks have different devices: {differing(names)}",
            odd_ones(names),
            "the slowest sets the pace; use nodes of one kind",
        )
    for ranks in job.nodes.values():
        yield from _judge_node(ranks, [parts[rank] for rank in ranks])


def _judge_devices(rank: int, part: dict[str, Any], local_rank: int) -> Iterator[Finding]:
    count = len(part["devices"])
    if part["device"] == "cpu":
        if part["has_idle_gpus"]:
            yield Finding(
                "error",
                "machine",
                "the node has GPUs, but torch sees none",
                (rank,),
                "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and whether torch is built for CUDA; or "
                "set DS_ACCELERATOR=cpu",
            )
    elif local_rank >= count:
        visible = part["visible"]
        reason = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        yield Finding(
            "error",
            "machine",
            f"local rank {local_rank} has no device of its own: it sees {count}{reason}",
            (rank,),
            "start as many ranks on a node as it has GPUs, and let each see all of them (no "
            "`--gpus-per-task` of Slurm, no CUDA_VISIBLE_DEVICES)",
        )


def _judge_node(ranks: list[int], parts: list[dict[str, Any]]) -> Iterator[Finding]:
    """Yields findings on the resources that ranks of a node share."""
    everybody, count = tuple(ranks), len(ranks)
    device = parts[0]["device"]
    cores = len(set().union(*(part["cores"] for part in parts)))
    threads = sum(part["threads"] for part in parts)
    if threads > cores:
        each = max(cores // count, 1)
        fix = f"export OMP_NUM_THREADS={each}"
        if cores < count:
            fix = "start fewer ranks, or (with Open MPI) `--bind-to none`"
        yield Finding(
            "warning" if device == "cpu" else "note",
            "machine",
            f"{count} ranks compute with {threads} threads on {cores} cores",
            everybody,
            fix,
        )
    needed, free = count * SHM_OF_RANK[device], min(part["shm"] for part in parts)
    size = f"/dev/shm has {free // MIB} MiB free"
    if free < needed:
        yield Finding(
            "error" if device == "cpu" else "warning",
            "machine",
            f"{size}, but {count} ranks take up to {needed // MIB} MiB: they would die by SIGBUS",
            everybody,
            "remove /dev/shm/deepspeed_* that no job uses; in a container, `--shm-size=1g` or "
            "`--ipc=host`",
        )
    soft, hard = (min(part["files"][i] for part in parts) for i in (0, 1))
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < _FILES:
        yield Finding(
            "warning",
            "machine",
            f"a process may open {soft} files only, and needs sockets for all ranks and data files",
            everybody,
            f"`ulimit -n {_FILES if hard == unlimited else min(_FILES, hard)}` before the job",
        )
    devices = f"{len(parts[0]['devices'])} x {parts[0]['devices'][0]}, " if device != "cpu" else ""
    yield Finding(
        "ok", "machine", f"{devices}{cores} core{'s' if cores > 1 else ''}, {size}", everybody
    )
