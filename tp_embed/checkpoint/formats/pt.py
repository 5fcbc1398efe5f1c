"""Reads and writes a single ``torch.save()`` file.

It holds a state dict, or a dict with one under ``model``, as training scripts write it::

    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}

torch indexes optimizer state by number, so the param groups must have the names as ``param_names``:
torch writes them for optimizers made from ``model.named_parameters()``. We write this form.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contents import DECAY, WEIGHT, Checkpoint, Key, Optimizer, Output, ReadOptions, Target
from ..errors import CheckpointError, shown
from ..files.arrays import Array
from ..files.derived import Held
from ..files.torch_file import TorchFile, placeholder
from ..files.torch_file import lay_out as lay_out_file

NAME = "pt"
IS_FILE = True
HAS_RANKS = False
HAS_OPTIMIZER = True
HAS_EXTRA = False
MAIN = WEIGHT

# Keys that training scripts use, here and in other formats of nested dicts.
MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim")
STEP_KEYS = ("step", "global_step", "iteration")
BUFFERS = "buffer_names"


def recognises(path: Path) -> bool:
    """Returns whether ``path`` is a file with a usual suffix of ``torch.save()``."""
    return path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt")


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Reads a state dict, or a dict that holds one next to an optimizer.

    :raises CheckpointError: the file holds no dict.
    """
    file = TorchFile(path, allow_unsafe=options.allow_unsafe_pickle)
    root = file.root
    if not isinstance(root, Mapping):
        raise CheckpointError(f"`{path}` must hold a dict, but holds a {type(root).__name__}.")
    model_key = next((key for key in MODEL_KEYS if _has_tensors(root.get(key))), None)
    # Entries next to the model, if the model is nested.
    beside = {} if model_key is None else {key: root[key] for key in root if key != model_key}
    model = root if model_key is None else root[model_key]
    tensors, ties = state_dict_arrays(file, model)
    notes = [
        f"`{name}` is no tensor and was left out: {shown(value)}"
        for name, value in model.items()
        if not isinstance(value, Tensor)
    ]
    optimizer = None
    optimizer_key = next((key for key in OPTIMIZER_KEYS if beside.get(key)), None)
    if optimizer_key is not None and options.with_optimizer:
        states, optimizer, odd = read_optimizer(file, beside[optimizer_key], options, path)
        tensors |= states
        notes += odd
    elif optimizer_key is not None:
        notes.append("The state of the optimizer was left out")
    step_key = next((key for key in STEP_KEYS if beside.get(key) is not None), None)
    buffers = beside.get(BUFFERS, ())
    if not isinstance(buffers, (list, tuple)) or not all(isinstance(n, str) for n in buffers):
        raise CheckpointError(f"`{BUFFERS}` in `{path}` must be names, but is {shown(buffers)}.")
    left_out = [key for key in beside if key not in (optimizer_key, step_key, BUFFERS)]
    notes += [f"`{shown(key)}` was left out: {shown(beside[key])}" for key in left_out]
    return Checkpoint(
        format=NAME,
        path=path,
        tensors=tensors,
        ties=ties,
        buffers=frozenset(buffers) & {key.name for key in tensors},
        step=None if step_key is None else file.plain(beside[step_key]),
        optimizer=optimizer,
        notes=tuple(notes),
        files=(path,),
    )


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def state_dict_arrays(
    file: TorchFile, model: Mapping[str, Any]
) -> tuple[dict[Key, Array], dict[str, str]]:
    """Returns the tensors of a state dict in ``file`` and the ties: tensors that share all elements
    are listed under their first name."""
    tensors: dict[Key, Array] = {}
    ties: dict[str, str] = {}
    places: dict[Hashable, str] = {}
    for name, value in model.items():
        if isinstance(value, Tensor):
            first = places.setdefault((file.place(value), value.dtype), name)
            if first == name:
                tensors[Key(name)] = file.array(value)
            else:
                ties[name] = first
    return tensors, ties


def read_optimizer(
    file: TorchFile, saved: Mapping[str, Any], options: ReadOptions, path: Path
) -> tuple[dict[Key, Array], Optimizer, list[str]]:
    """Returns the tensors and the rest of a torch optimizer's state dict in ``file``, and notes
    about dropped entries."""
    groups = saved["param_groups"]
    indices = list(chain.from_iterable(group["params"] for group in groups))
    names = options.optimizer_names or tuple(
        chain.from_iterable(group.get("param_names", ()) for group in groups)
    )
    if len(names) != len(indices) or len(set(names)) != len(names):
        raise CheckpointError(
            f"The optimizer in `{path}` must say the names of its {len(indices)} Parameters as "
            f"`param_names` in its groups, but says {len(names)}. Make it with "
            "`model.named_parameters()`, or pass `--optimizer-names`."
        )
    by_index = dict(zip(indices, names, strict=True))
    tensors: dict[Key, Array] = {}
    steps, notes = {}, []
    for index, state in saved["state"].items():
        for key, value in state.items():
            if key == WEIGHT:
                raise CheckpointError(
                    f"The optimizer in `{path}` must not have a state called `{key}`, which names "
                    "the Parameter itself. Save it under another name."
                )
            if key == "step":
                steps[by_index[index]] = file.number("A `step`", value)
            elif isinstance(value, Tensor):
                tensors[Key(by_index[index], key)] = file.array(value)
            elif key == DECAY and isinstance(value, float):
                tensors[Key(by_index[index], key)] = Held(torch.tensor(value, dtype=torch.float64))
            else:
                name = f"`{shown(key)}` of `{by_index[index]}` in the optimizer"
                notes.append(f"{name} is no tensor and was left out: {shown(value)}")
    named = []
    for group in groups:
        kept, odd = file.hyperparameters(group)
        named.append({**kept, "params": [by_index[index] for index in group["params"]]})
        notes += odd
    return tensors, Optimizer(tuple(named), steps), notes


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out one file with a dict of the model, the optimizer, the step and buffer names."""
    held = {key: placeholder(array.shape, array.dtype) for key, array in checkpoint.tensors.items()}
    model = {key.name: tensor for key, tensor in held.items() if key.state == WEIGHT}
    model |= {alias: model[name] for alias, name in checkpoint.ties.items()}
    root: dict[str, Any] = {"model": model, BUFFERS: sorted(checkpoint.buffers)}
    if checkpoint.step is not None:
        root["step"] = checkpoint.step
    if checkpoint.optimizer is not None:
        root["optimizer"] = _optimizer_root(checkpoint.optimizer, held)
    file = lay_out_file(path, root)

    arrays = {Key(name): file.array(file.root["model"][name]) for name in model}
    for name, state in _by_name(file.root.get("optimizer")).items():
        arrays |= {
            Key(name, key): file.array(value) for key, value in state.items() if key != "step"
        }
    return Output({key: arrays[key] for key in checkpoint.tensors})


def _optimizer_root(optimizer: Optimizer, held: Mapping[Key, Tensor]) -> dict[str, Any]:
    """Builds a state dict for torch's optimizer."""
    states: dict[str, dict[str, Any]] = {}
    for key, tensor in held.items():
        if key.state != WEIGHT:
            states.setdefault(key.name, {})[key.state] = tensor
    groups, state, first = [], {}, 0
    for group in optimizer.groups:
        names = group["params"]
        indices = list(range(first, first + len(names)))
        first += len(names)
        groups.append({**group, "params": indices, "param_names": list(names)})
        for index, name in zip(indices, names, strict=True):
            own = states.get(name, {})
            if name in optimizer.steps:
                own["step"] = torch.tensor(optimizer.steps[name], dtype=torch.float32)
            if own:
                state[index] = own
    return {"state": state, "param_groups": groups}


def _by_name(saved: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """Maps names of Parameters to their states in the output of :func:`_optimizer_root`."""
    if saved is None:
        return {}
    return {
        name: saved["state"][index]
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
        if index in saved["state"]
    }
