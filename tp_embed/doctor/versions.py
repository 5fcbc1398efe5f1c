"""Checks that versions of Python, torch, DeepSpeed and others are supported, and agree."""

from __future__ import annotations

import hashlib
import operator
import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .findings import Finding, differing, odd_ones
from .job import Job

PACKAGES = ("torch", "deepspeed", "hydra-core", "transformers", "safetensors", "tp-embed")

# Ranks that differ in one of these may hang, or compute different results.
_MUST_AGREE = ("Python", "torch", "deepspeed", "tp-embed", "the source of tp_embed")
_MISSING = "missing"

_COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def look() -> dict[str, Any]:
    """Collects the versions of Python, of packages, and of the build of torch."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = _MISSING
    found["the source of tp_embed"] = _hash_source()
    build = {
        "CUDA": torch.version.cuda or torch.version.hip or "none",
        "NCCL": _nccl_version(),
        "driver": _driver_version(),
        "CPU kernels": torch.backends.cpu.get_cpu_capability(),
    }
    return {"packages": found, "build": build, "supported": supported()}


def judge(job: Job) -> Iterator[Finding]:
    """Yields findings on versions."""
    parts = job.part("versions")
    everywhere = tuple(parts)
    agreed = True
    for name in parts[0]["packages"]:
        by_rank = {rank: part["packages"][name] for rank, part in parts.items()}
        if len(set(by_rank.values())) > 1:
            agreed = False
            is_patch = name == "Python" and len({_release(v)[:2] for v in by_rank.values()}) == 1
            yield Finding(
                "error" if name in _MUST_AGREE and not is_patch else "warning",
                "versions",
                f"ranks have different versions of {name}: {differing(by_rank)}",
                odd_ones(by_rank),
                "install the same version on every node, and check PATH and PYTHONPATH there",
            )
    for rank, part in parts.items():
        for name, version in part["packages"].items():
            wanted = part["supported"].get(name, "")
            if version != _MISSING and not is_supported(version, wanted):
                agreed = False
                yield Finding(
                    "error",
                    "versions",
                    f"{name} must be {wanted}, but is {version}",
                    (rank,),
                    f"pip install '{name}{wanted}'",
                )
    for name in parts[0]["build"]:
        by_rank = {rank: part["build"][name] for rank, part in parts.items()}
        if len(set(by_rank.values())) > 1:
            yield Finding(
                "error" if name in ("CUDA", "NCCL") else "warning",
                "versions",
                f"ranks have different versions of {name}: {differing(by_rank)}",
                odd_ones(by_rank),
                "results may differ in the last bits; use the same build of torch, and nodes of "
                "one kind",
            )
    if agreed:
        packages: Mapping[str, str] = parts[0]["packages"]
        shown = [f"{name} {packages[name]}" for name in ("Python", *PACKAGES)]
        yield Finding("ok", "versions", ", ".join(shown), everywhere)
    yield Finding(
        "ok",
        "versions",
        "torch is built for " + ", ".join(f"{k} {v}" for k, v in parts[0]["build"].items()),
        (0,),
    )


def supported() -> dict[str, str]:
    """Returns the versions that this package requires, as ``{"torch": ">=2.13,<2.14"}``."""
    try:
        requirements = metadata.requires("tp-embed") or []
        found = {"Python": metadata.metadata("tp-embed")["Requires-Python"] or ""}
    except metadata.PackageNotFoundError:
        return {}  # Not installed: it runs from its source tree.
    for requirement in requirements:
        matched = re.match(r"([\w.-]+)\s*([<>=!~][^;\[]*)", requirement)
        if matched:
            found[matched[1]] = ",".join(sorted(matched[2].strip().split(","), reverse=True))
    return found


def is_supported(version: str, wanted: str) -> bool:
    """Returns whether the release numbers of ``version`` satisfy the specifier ``wanted``.

    >>> is_supported("2.13.0+cpu", ">=2.13,<2.14")
    True
    """
    for clause in filter(None, wanted.split(",")):
        matched = re.match(r"(>=|<=|==|!=|>|<)\s*([\d.]+)$", clause.strip())
        if matched and not _COMPARE[matched[1]](_release(version), _release(matched[2])):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    matched = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in matched[0].split(".")] if matched else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _hash_source() -> str:
    """Hashes the source of this package: an editable install may change under one version."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _nccl_version() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    matched = re.search(r"Kernel Module\D*([\d.]+)", text)
    return matched[1] if matched else "unknown"
