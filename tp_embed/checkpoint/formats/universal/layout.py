"""Lays out universal checkpoints that engines load at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...contents import MASTER, MOMENTS, WEIGHT, Arrays, Checkpoint, Key, Output, Target
from ...cuts import join
from ...errors import CheckpointError
from ...files.arrays import Array
from ...files.derived import Copies
from ...files.torch_file import lay_out as lay_out_file
from ...files.torch_file import placeholder
from ..apart import lay_out_apart
from ..deepspeed.cut_info import write_info
from ..deepspeed.files import SCALARS, STRUCTURE
from ..deepspeed.shards import DS_VERSION, step_of
from .cuts import cut_entries
from .paths import (
    LATEST,
    OPTIMIZER_STATE,
    PARAM,
    STEP,
    model_file,
    optimizer_state_file,
    parameter_directory,
    state_file,
)

# The limit for a file name on Linux.
_MAX_NAME_BYTES = 255


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out one file for each tensor and state, and the model files of the ranks."""
    return lay_out_apart(checkpoint, target, lambda rest: _lay_out(rest, target, path))


def _lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> tuple[Path, Arrays]:
    _check(checkpoint)
    steps = _steps(checkpoint)
    step = step_of(checkpoint)
    tag = f"global_step{step}_universal"
    directory = path / tag
    # Even a checkpoint of buffers only has the directory of Parameters.
    optimizer_state_file(directory).parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[Key, Array] = {}
    for key, array in checkpoint.tensors.items():
        if key.name not in checkpoint.buffers:
            folder = parameter_directory(directory, key.name)
            folder.mkdir(exist_ok=True)
            param = placeholder(array.shape, array.dtype)
            entry = {PARAM: param, **cut_entries(target.cuts[key.name])}
            file = lay_out_file(state_file(folder, key.state), entry)
            arrays[key] = file.array(file.root[PARAM])
    info = _info(checkpoint, target)
    if steps:
        optimizer_state, by_name = _optimizer_state(checkpoint, steps)
        # Not in the model files: an engine passes those to its client, and if the client saves the
        # info with a checkpoint that is cut otherwise, it overwrites the correct one there.
        lay_out_file(optimizer_state_file(directory), {**optimizer_state, **info})
        info = {}
        for name, value in by_name.items():
            lay_out_file(state_file(parameter_directory(directory, name), STEP), value)
    arrays |= _lay_out_ranks(checkpoint, target, directory, {"global_steps": step, **info})
    (path / LATEST).write_text(tag)
    return directory, {key: arrays[key] for key in checkpoint.tensors}


def _check(checkpoint: Checkpoint) -> None:
    """Checks names and states.

    :raises CheckpointError: this format cannot hold ``checkpoint``.
    """
    states: dict[str, set[str]] = {}
    for key in checkpoint.tensors:
        if key.name in checkpoint.buffers:
            continue
        if key.name in ("", ".", "..", OPTIMIZER_STATE) or {"/", "\0"} & set(key.name):
            raise CheckpointError(
                "The name of a Parameter must be a valid directory name in a universal checkpoint, "
                f"but is {key.name!r}."
            )
        if len(key.name.encode()) > _MAX_NAME_BYTES:
            raise CheckpointError(
                "The name of a Parameter must have at most 255 bytes in a universal checkpoint, "
                f"but `{key.name}` has more."
            )
        states.setdefault(key.name, set()).add(key.state)
    for name, own in states.items():
        if own not in ({MASTER}, {MASTER, *MOMENTS}):
            raise CheckpointError(
                f"The optimizer's state of `{name}` must be Adam's, {list(MOMENTS)}, but is "
                f"{sorted(own - {MASTER})}. Universal checkpoints hold no other."
            )


def _steps(checkpoint: Checkpoint) -> dict[str, float]:
    """Returns the step counts of trained Parameters."""
    steps = {}
    for key in checkpoint.tensors:
        if key.state == MOMENTS[0]:
            own = checkpoint.optimizer and checkpoint.optimizer.steps.get(key.name)
            steps[key.name] = checkpoint.step if own is None else own
            if steps[key.name] is None:
                raise CheckpointError(
                    f"The number of steps of `{key.name}` must be known, since there are moments, "
                    "but the source does not say it."
                )
    return steps  # type: ignore[return-value]


def _optimizer_state(
    checkpoint: Checkpoint, steps: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the optimizer's state other than tensors, and the step of each Parameter."""
    assert checkpoint.optimizer is not None  # `steps` is not empty.
    groups, by_name = [], {}
    for group in checkpoint.optimizer.groups:
        names = [checkpoint.ties.get(name, name) for name in group["params"]]
        groups.append({**group, "params": names})
        for name in names:
            if name in steps:
                # DeepSpeed's own Adams count in plain numbers, torch's in tensors.
                is_own = "bias_correction" in group
                by_name[name] = (
                    int(steps[name]) if is_own else torch.tensor(steps[name], dtype=torch.float32)
                )
    if missing := sorted(steps.keys() - by_name.keys()):
        raise CheckpointError(
            f"`{missing[0]}` must be in a param group of the optimizer, since it has states, but "
            f"is in none of the {len(groups)}."
        )
    last = max(by_name.values(), key=float)
    scalars = {key: checkpoint.extra[key] for key in SCALARS if key in checkpoint.extra}
    return {
        **scalars,
        "ds_version": DS_VERSION,
        # For ZeRO 1 and 2, and for ZeRO 3.
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {STEP: last}}, "param_groups": groups},
    }, by_name


def _lay_out_ranks(
    checkpoint: Checkpoint, target: Target, directory: Path, more: Mapping[str, Any]
) -> dict[Key, Array]:
    """Lays out the files of each tensor-parallel rank, under the name that engines at ZeRO 0 to 2
    expect and again under ZeRO 3's."""
    buffers = {key: array for key, array in checkpoint.tensors.items() if key.state == WEIGHT}
    common = {**_common(checkpoint, target), **more}
    shards: dict[Key, list[Array]] = {key: [] for key in buffers}
    for rank in range(target.tp_size):
        module = {}
        for key, array in buffers.items():
            cut = target.cuts[key.name]
            shape = array.shape if cut is None else cut.shard_shape(array.shape, rank)
            module[key.name] = placeholder(shape, array.dtype)
        files = [
            lay_out_file(
                model_file(directory, rank, stage),
                {**common, "module": module},
            )
            for stage in (1, 3)
        ]
        for key in buffers:
            copies = [file.array(file.root["module"][key.name]) for file in files]
            shards[key].append(Copies(key.name, copies))
    return {key: join(key.name, target.cuts[key.name], shards[key]) for key in buffers}


def _common(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """Returns the entries that the files of all ranks share."""
    kept = {
        key: value
        for key, value in checkpoint.extra.items()
        if key not in STRUCTURE and key not in SCALARS
    }
    return {
        "lr_scheduler": None,
        "skipped_steps": 0,
        "ds_version": DS_VERSION,
        **kept,
        "buffer_names": [name for name in checkpoint.names if name in checkpoint.buffers],
        "shared_params": dict(checkpoint.ties),
        "dp_world_size": 1,
        "mp_world_size": target.tp_size,
    }


def _info(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """Returns the cuts of Parameters. Only conversions read them."""
    if target.tp_size == 1:
        return {}
    shapes = {
        key.name: array.shape for key, array in checkpoint.tensors.items() if key.state == MASTER
    }
    trained = {key.name for key in checkpoint.tensors if key.state == MOMENTS[0]}
    return {"universal_checkpoint_info": write_info(shapes, target.cuts, target.tp_size, trained)}
