"""Checkpoints of DeepSpeed's engines, for the tests that read them."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch

import convert_job as job
from forks import run_script
from tp_embed.checkpoint.contents import ReadOptions
from tp_embed.checkpoint.formats import deepspeed
from universal_job import optimizer_names

BF16 = {"dtype": "bfloat16"}
ROBIN = {"round_robin_gradients": True}
TYPED_NAMES = tuple(optimizer_names(job.build({"typed": True})))

# By the number of ranks. Those without tensor parallelism come first.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp z0 bf16": {"stage": 0, **BF16},
        "dp z0 typed": {"stage": 0, "typed": True},
        "dp z1": {"stage": 1},
        "dp z1 robin bf16": {"stage": 1, "zero": ROBIN, **BF16},
        "dp z2 typed robin bf16": {"stage": 2, "typed": True, "zero": ROBIN, **BF16},
        "dp z2 typed bf16": {"stage": 2, "typed": True, **BF16},
        "dp z3 tied": {"stage": 3, "tied": True},
        "dp z3 before": {"stage": 3, "typed": True, "steps": 0},
        "z0": {"stage": 0, "tp": 2},
        "z1": {"stage": 1, "tp": 2},
        "z1 typed bf16": {"stage": 1, "tp": 2, "typed": True, **BF16},
        "z2 tied": {"stage": 2, "tp": 2, "tied": True},
        "z2 mpu": {"stage": 2, "tp": 2, "mpu": True},
        "z3 typed bf16": {"stage": 3, "tp": 2, "typed": True, **BF16},
    },
    4: {
        "four z1 typed bf16": {"stage": 1, "tp": 2, "typed": True, **BF16},
        "four z3 tied": {"stage": 3, "tp": 2, "tied": True},
    },
}
ALL = {name: case for cases in CASES.values() for name, case in cases.items()}


def train_engines(out):
    """Saves a checkpoint of each case."""
    for ranks, cases in CASES.items():
        plan = out / f"{ranks}.json"
        plan.write_text(json.dumps(cases))
        run_script(job.__file__, out, plan, ranks=ranks)


def seen_by_ranks(out):
    """Returns what the tensor-parallel ranks saw in each case."""
    seen = {}
    for ranks, cases in CASES.items():
        by_rank = [torch.load(out / f"{ranks}.{rank}.pt") for rank in range(ranks)]
        for name, case in cases.items():
            seen[name] = [own[name] for own in by_rank[: case.get("tp", 1)]]
    return seen


def copy_tag(out, tmp_path, name):
    """Copies the tag of a case, for changes."""
    return shutil.copytree(out / name / "end", tmp_path / "source" / "end")


def read(path, **options):
    return deepspeed.read(path, ReadOptions(**options))


def read_case(out, name):
    names = TYPED_NAMES if name == "dp z0 typed" else None
    return read(out / name, optimizer_names=names)


def change(path, **changes):
    """Changes entries of a file, given by paths such as `optimizer_state_dict__overflow` or
    `param_groups__0__lr`."""
    root = torch.load(path, weights_only=False)
    for place, value in changes.items():
        *keys, last = (int(key) if key.isdecimal() else key for key in place.split("__"))
        owner = root
        for key in keys:
            owner = owner[key]
        owner[last] = value
    torch.save(root, path)


def model_files(path):
    return sorted(path.glob("*_model_states.pt"))


def optimizer_files(path):
    return sorted(path.glob("*_optim_states.pt"))
