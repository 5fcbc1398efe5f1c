"""Compares the config, the environment and random numbers over all ranks."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .findings import Finding, differing, odd_ones
from .job import Job

# Read by torch, NCCL, gloo, DeepSpeed, transformers, or by Python.
_VARIABLES = re.compile(
    r"(NCCL|GLOO|DS|OMP|MKL|UCX|FI|TORCH|PYTORCH|HF|TRANSFORMERS|CUBLAS|TP_EMBED)_\w+"
    r"|PYTHON(PATH|HASHSEED)|LD_(LIBRARY_PATH|PRELOAD)|CUDA_(DEVICE_MAX_CONNECTIONS|HOME)"
)
_SECRET = re.compile(r"\w*(TOKEN|SECRET|PASSWORD|KEY)\w*")
_MAY_DIFFER = re.compile(r"\w+_SOCKET_IFNAME|NCCL_IB_HCA|UCX_NET_DEVICES|FI_\w+")

_SHOWN = 5  # Differences of configs.


def look(config: str | None) -> dict[str, Any]:
    """Collects environment variables, the config, and hashes of random numbers."""
    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name) and not _SECRET.fullmatch(name)
    }
    found: dict[str, Any] = {"environment": environment, "numbers": _hash_numbers()}
    if config is not None:
        found["config"] = _read_config(config)
    return found


def judge(job: Job) -> Iterator[Finding]:
    """Yields findings on values that must be the same on all ranks."""
    parts = job.part("agreement")
    everywhere = tuple(parts)
    if "config" in parts[0]:
        yield from _judge_configs({rank: part["config"] for rank, part in parts.items()})
    environments = {rank: part["environment"] for rank, part in parts.items()}
    differences = 0
    for name in sorted(set().union(*environments.values())):
        values = {rank: _shown(each.get(name)) for rank, each in environments.items()}
        if len(set(values.values())) > 1:
            differences += 1
            yield Finding(
                "note" if _MAY_DIFFER.fullmatch(name) else "warning",
                "agreement",
                f"{name} differs: {differing(values)}",
                odd_ones(values),
                "pass it to all ranks: `.deepspeed_env`, `mpirun -x NAME`, `srun --export=ALL`",
            )
    if not differences:
        what = f"{len(environments[0])} variables that libraries read are the same"
        yield Finding("ok", "agreement", what, everywhere)
    for device in parts[0]["numbers"]:
        numbers = {rank: part["numbers"].get(device, "none") for rank, part in parts.items()}
        if len(set(numbers.values())) > 1:
            yield Finding(
                "error",
                "agreement",
                f"torch.manual_seed(0) gives different numbers ({device}): {differing(numbers)}",
                odd_ones(numbers),
                "models initialized on each rank will differ: use one version of torch and one "
                "kind of processor, or broadcast the initial model",
            )
        else:
            what = f"torch.manual_seed(0) gives the same numbers ({device})"
            yield Finding("ok", "agreement", what, everywhere)


def _read_config(path: str) -> dict[str, Any]:
    """Reads a JSON config as values by dotted names, or any other file as lines."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        return {"path": path, "error": getattr(e, "strerror", None) or str(e)}
    try:
        values = dict(_flat("", json.loads(text)))
    except ValueError as e:
        if path.endswith(".json"):
            return {"path": path, "error": f"not valid JSON: {e}"}
        lines = (line.rstrip() for line in text.splitlines())
        values = {f"line {i}": line for i, line in enumerate(lines, 1)}
    return {"path": path, "values": values}


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(f"{name}.{key}" if name else key, each)
    else:
        yield name, json.dumps(value)


def _judge_configs(configs: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    unread = {rank: config["error"] for rank, config in configs.items() if "error" in config}
    for rank, error in unread.items():
        yield Finding(
            "error",
            "agreement",
            f"the config {configs[rank]['path']} cannot be read: {error}",
            (rank,),
            "put it at a path that all nodes can read",
        )
    values = {rank: config["values"] for rank, config in configs.items() if rank not in unread}
    found = [
        (name, by_rank)
        for name in dict.fromkeys(name for each in values.values() for name in each)
        if len(set((by_rank := {r: v.get(name, "nothing") for r, v in values.items()}).values()))
        > 1
    ]
    for name, by_rank in found[:_SHOWN]:
        yield Finding(
            "error",
            "agreement",
            f"the config differs: {name} is "
            f"{differing({rank: _shown(value) for rank, value in by_rank.items()})}",
            odd_ones(by_rank),
            "copy one config to all nodes",
        )
    if len(found) > _SHOWN:
        what = f"the config differs in {len(found) - _SHOWN} more values"
        yield Finding("error", "agreement", what, tuple(values), "copy one config to all nodes")
    if not found and not unread:
        first = next(iter(configs.values()))
        digest = hashlib.sha256(json.dumps(first["values"], sort_keys=True).encode()).hexdigest()
        what = f"the config {first['path']} is the same ({digest[:12]})"
        yield Finding("ok", "agreement", what, tuple(configs))


def _hash_numbers() -> dict[str, str]:
    """Hashes the numbers that each kind of generator draws after ``manual_seed(0)``."""
    found = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            generator = torch.Generator(device).manual_seed(0)
            drawn = [
                torch.randn(4096, generator=generator, device=device),
                torch.rand(4096, generator=generator, device=device),
                torch.randperm(4096, generator=generator, device=device),
            ]
            data = b"".join(bytes(t.cpu().view(torch.uint8).tolist()) for t in drawn)
        except RuntimeError as e:
            found[device] = f"fails: {str(e).splitlines()[0]}"
            continue
        found[device] = hashlib.sha256(data).hexdigest()[:12]
    return found


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    return repr(value if len(value) <= 80 else f"{value[:77]}...")
