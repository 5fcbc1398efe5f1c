"""What an engine trains of a checkpoint: its param groups, and what the optimizer has of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...contents import MASTER, WEIGHT, Checkpoint, Key, Optimizer
from ...errors import CheckpointError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Group:
    """A param group.

    :param hyperparameters: all but its Parameters.
    :param states: what the optimizer has of each, besides the number of steps; the same of all. It
        is for flat tensors only.
    :param step: this number, if it has made some; for flat tensors too.
    """

    names: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    states: Mapping[str, torch.dtype]
    step: int | None


@dataclass(frozen=True)
class Trained:
    """The Parameters of a checkpoint, as an engine has them.

    :param dtype: that of the weights that are trained.
    :param master_dtype: that of the optimizer's copies of them.
    """

    groups: tuple[Group, ...]
    dtype: torch.dtype
    master_dtype: torch.dtype


def find_trained(checkpoint: Checkpoint, *, is_flat: bool) -> Trained:
    """What is trained: what is in the param groups of the checkpoint, or, if it has none, all.

    :param is_flat: the Parameters of a param group are in one flat tensor, with one step count.
    :raises CheckpointError: an engine could not have this.
    """
    parameters = [name for name in checkpoint.names if name not in checkpoint.buffers]
    states = _states(checkpoint)
    if checkpoint.optimizer is None:
        groups: tuple[Group, ...] = (Group(tuple(parameters), {}, {}, None),)
        if any(states.values()):
            raise CheckpointError(
                "A checkpoint with states of an optimizer must have its param groups, but "
                f"`{checkpoint.path}` has none."
            )
    else:
        listed = [
            _names(checkpoint, index, group)
            for index, group in enumerate(checkpoint.optimizer.groups)
        ]
        _check_names([name for own in listed for name in own], parameters)
        groups = tuple(
            _group(checkpoint.optimizer, index, own, states, is_flat)
            for index, own in enumerate(listed)
        )
    names = [name for group in groups for name in group.names]
    members = set(names)
    outside = [name for name in parameters if name not in members]
    if stray := [name for name in outside if states[name]]:
        raise CheckpointError(
            f"`{stray[0]}` must be in a param group of the optimizer, since there are states of "
            f"it, but is in none of the {len(groups)}."
        )
    return Trained(
        groups,
        _one_dtype("weights", {name: _weight_dtype(checkpoint, name) for name in names}),
        _one_dtype("optimizer's fp32 weights", {n: _master_dtype(checkpoint, n) for n in names}),
    )


def _names(checkpoint: Checkpoint, index: int, group: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a param group."""
    listed = group.get("params")
    if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(
            f"Param group {index} of the optimizer must have the names of its Parameters, but has "
            f"{str(listed)[:80]}. Pass `--optimizer-names`."
        )
    if not listed:
        raise CheckpointError(f"Param group {index} of the optimizer must not be empty, but is.")
    return tuple(checkpoint.ties.get(name, name) for name in listed)


def _group(
    optimizer: Optimizer,
    index: int,
    names: tuple[str, ...],
    states: Mapping[str, Mapping[str, torch.dtype]],
    is_flat: bool,
) -> Group:
    group = optimizer.groups[index]
    values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if not is_flat:
        return Group(names, values, {}, None)
    first = states[names[0]]
    for name in names:
        if states[name] != first:
            raise CheckpointError(
                "The optimizer must have the same states of all Parameters of a param group for "
                f"DeepSpeed, but has {_text(first)} of `{names[0]}` and "
                f"{_text(states[name])} of `{name}`. Leave Parameters that are not trained "
                "out of the param groups, or convert without the optimizer's state."
            )
    steps = {optimizer.steps.get(name) for name in names} if first else {None}
    if len(steps) > 1:
        raise CheckpointError(
            f"All Parameters of param group {index} must have made the same number of steps for "
            f"DeepSpeed, but have made {sorted(steps, key=str)}."
        )
    step = steps.pop()
    return Group(names, values, first, None if step is None else whole_step(names[0], step))


def whole_step(name: str, step: float) -> int:
    """A number of steps of the Parameter ``name``, as optimizers count them."""
    if not math.isfinite(step) or step != int(step) or step < 0:
        raise CheckpointError(
            f"The number of steps of `{name}` must be a whole number from 0 on, but is {step}."
        )
    return int(step)


def _states(checkpoint: Checkpoint) -> dict[str, dict[str, torch.dtype]]:
    """What the optimizer has of each name, with its dtype."""
    found: dict[str, dict[str, torch.dtype]] = {name: {} for name in checkpoint.names}
    for key, array in checkpoint.tensors.items():
        if key.state in (WEIGHT, MASTER):
            continue
        if array.shape != checkpoint.shape(key.name):
            raise CheckpointError(
                f"`{key}` must have the shape {checkpoint.shape(key.name)} of its Parameter for "
                f"DeepSpeed, but has {array.shape}."
            )
        found[key.name][key.state] = array.dtype
    return {name: dict(sorted(states.items())) for name, states in found.items()}


def _check_names(names: Sequence[str], parameters: Sequence[str]) -> None:
    known = set(parameters)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not known.issuperset(names):
        wrong = twice or sorted(set(names) - known)
        raise CheckpointError(
            "The param groups of the optimizer must have each Parameter once, but "
            f"`{wrong[0]}` is {'there twice' if twice else 'no Parameter of the checkpoint'}."
        )


def _weight_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    array = checkpoint.tensors.get(Key(name))
    return array.dtype if array is not None else checkpoint.tensors[Key(name, MASTER)].dtype


def _master_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    array = checkpoint.tensors.get(Key(name, MASTER))
    return array.dtype if array is not None else torch.float32


def _one_dtype(what: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    if not dtypes:
        raise CheckpointError("There must be Parameters to train for DeepSpeed, but are none.")
    first_name, first = next(iter(dtypes.items()))
    for name, dtype in dtypes.items():
        if dtype != first or dtype not in _DTYPES:
            raise CheckpointError(
                f"The {what} must all be of one dtype of {[str(each) for each in _DTYPES]} for "
                f"DeepSpeed, but `{first_name}` is of {first} and `{name}` of {dtype}. Choose one "
                "with `--dtype`."
            )
    return first


def _text(states: Mapping[str, torch.dtype]) -> str:
    return str({state: str(dtype) for state, dtype in states.items()}) if states else "none"
