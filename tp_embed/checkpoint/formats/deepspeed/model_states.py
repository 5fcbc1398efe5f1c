"""Writes the files ``*_model_states.pt`` of an engine: the model, at ZeRO 0 the optimizer, and the
state of the training run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...contents import MASTER, WEIGHT, Checkpoint, Key, Target
from ...errors import CheckpointError
from ...files.arrays import Index
from ...files.torch_file import TorchFile, lay_out, placeholder
from .files import SCALARS, STRUCTURE
from .partitions import cut_shards
from .shards import DS_VERSION, Places, Shards, ds_config, step_of
from .trained import whole_step


def lay_out_model(shards: Shards, places: Places) -> None:
    """Lays out the file of a tensor-parallel rank; at ZeRO 3, one per data-parallel rank."""
    dp_ranks = range(shards.dp_size) if shards.stage == 3 else [0]
    files = [_lay_out_one(shards, dp_rank) for dp_rank in dp_ranks]
    for file in files:
        for name in _whole_names(shards):
            places.add(shards.main_key(name), file.array(file.root["module"][name]))
    if shards.stage == 3:
        for name in shards.frozen:
            _place_frozen(shards, places, name, files)
    if shards.stage == 0 and shards.checkpoint.optimizer is not None:
        _place_optimizer(shards, places, files[0])


def check_plain(value: Any, what: str) -> None:
    """Checks that ``value`` contains no tensor.

    :raises CheckpointError: it does.
    """
    if isinstance(value, Tensor):
        raise CheckpointError(f"{what} must be plain Python values for DeepSpeed, but has tensors.")
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        return
    for each in value:
        check_plain(each, what)


def _lay_out_one(shards: Shards, dp_rank: int) -> TorchFile:
    checkpoint, stage = shards.checkpoint, shards.stage
    whole = set(_whole_names(shards))
    module: dict[str, Tensor] = {}
    for name in checkpoint.names:
        dtype = checkpoint.tensors[shards.main_key(name)].dtype
        module[name] = placeholder(shards.shapes[name] if name in whole else (0,), dtype)
    frozen: dict[str, Tensor] = {}
    for name in shards.frozen:
        part = (shards.part_size(name),)
        frozen[name] = module[name] if stage < 3 else placeholder(part, module[name].dtype)
    root = {
        "module": module | {alias: module[name] for alias, name in checkpoint.ties.items()},
        "buffer_names": [name for name in checkpoint.names if name in checkpoint.buffers],
        "optimizer": _optimizer(shards) if stage == 0 else None,
        "param_shapes": [_shapes(flat.fragments, shards.shapes) for flat in shards.flats]
        if stage
        else None,
        "frozen_param_shapes": _shapes(frozen, shards.shapes) if stage >= 2 else None,
        "shared_params": dict(checkpoint.ties) if stage else None,
        "frozen_param_fragments": frozen if stage >= 2 else None,
        **_run_state(checkpoint, shards.target),
    }
    # It is long, and only the first rank's is read. Engines without tensor parallelism have none.
    if dp_rank == 0 and shards.target.tp_size > 1:
        root["universal_checkpoint_info"] = shards.info
    prefix = f"zero_pp_rank_{dp_rank}_" if stage == 3 else ""
    path = shards.directory / f"{prefix}mp_rank_{shards.tp_rank:02d}_model_states.pt"
    return lay_out(path, root)


def _whole_names(shards: Shards) -> list[str]:
    """Returns the names of tensors that model files store with their values."""
    checkpoint = shards.checkpoint
    return [name for name in checkpoint.names if shards.stage < 3 or name in checkpoint.buffers]


def _shapes(names: Iterable[str], shapes: Mapping[str, Index]) -> dict[str, torch.Size]:
    return {name: torch.Size(shapes[name]) for name in names}


def _run_state(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """Returns the state of the training run, including the client's state."""
    extra = {
        key: value
        for key, value in checkpoint.extra.items()
        if key not in STRUCTURE and key not in SCALARS
    }
    check_plain(extra, f"The training state in `{checkpoint.path}`")
    return {
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        **extra,
        "global_steps": step_of(checkpoint),
        "dp_world_size": target.dp_size,
        "mp_world_size": target.tp_size,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": target.tp_size},
        "ds_config": ds_config(checkpoint, target),
        "ds_version": DS_VERSION,
    }


def _place_frozen(shards: Shards, places: Places, name: str, files: list[TorchFile]) -> None:
    size = torch.Size(shards.shapes[name]).numel()
    if size:
        arrays = [file.array(file.root["frozen_param_fragments"][name]) for file in files]
        [flat] = cut_shards([{name: size}], len(files), size)
        places.add_fragments(shards.main_key(name), flat, arrays)
    else:
        places.add_empty(shards.main_key(name))


def _optimizer(shards: Shards) -> dict[str, Any] | None:
    """Builds the state dict of torch's optimizer, which ZeRO 0 saves."""
    checkpoint = shards.checkpoint
    if checkpoint.optimizer is None:
        return None
    states: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, step in checkpoint.optimizer.steps.items():
        states[name]["step"] = whole_step(name, step)
    for key, array in checkpoint.tensors.items():
        if key.state not in (WEIGHT, MASTER):
            states[key.name][key.state] = placeholder(shards.shapes[key.name], array.dtype)
    groups: list[dict[str, Any]] = []
    state: dict[int, dict[str, Any]] = {}
    for group in shards.trained.groups:
        first = sum(len(each["params"]) for each in groups)
        indices = list(range(first, first + len(group.names)))
        # torch defines `param_names`, and its optimizers keep them.
        names = {"param_names": list(group.names)}
        groups.append({**group.hyperparameters, **names, "params": indices})
        for index, name in zip(indices, group.names, strict=True):
            if name in states:
                state[index] = states[name]
    return {"state": state, "param_groups": groups}


def _place_optimizer(shards: Shards, places: Places, file: TorchFile) -> None:
    names = [name for group in shards.trained.groups for name in group.names]
    for index, own in file.root["optimizer"]["state"].items():
        for key, value in own.items():
            if key != "step":
                places.add(Key(names[index], key), file.array(value))
