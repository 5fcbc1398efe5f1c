"""Finds what an engine trains in a checkpoint: its param groups and their optimizer states."""

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

    :param hyperparameters: all entries except its Parameters.
    :param states: the optimizer states that every Parameter has, without the step. Only for flat
        tensors.
    :param step: the step count, if any. Only for flat tensors.
    """

    names: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    states: Mapping[str, torch.dtype]
    step: int | None


@dataclass(frozen=True)
class Trained:
    """The Parameters of a checkpoint that an engine trains.

    :param dtype: the dtype of the weights.
    :param master_dtype: the dtype of the optimizer's copies.
    """

    groups: tuple[Group, ...]
    dtype: torch.dtype
    master_dtype: torch.dtype


def find_trained(checkpoint: Checkpoint, *, is_flat: bool) -> Trained:
    """Returns the Parameters in the param groups of the checkpoint, or all if it has no groups.

    :param is_flat: the Parameters of a param group share one flat tensor and step count.
    :raises CheckpointError: an engine cannot hold this optimizer.
    """
    parameters = [name for name in checkpoint.names if name not in checkpoint.buffers]
    states = _states(checkpoint)
    if checkpoint.optimizer is None:
        groups: tuple[Group, ...] = (Group(tuple(parameters), {}, {}, None),)
        if any(states.values()):
            raise CheckpointError(
                "A checkpoint with optimizer states must have param groups, but "
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
            f"`{stray[0]}` must be in a param group of the optimizer, since it has states, but is "
            f"in none of the {len(groups)}."
        )
    return Trained(
        groups,
        _one_dtype("weights", {name: _weight_dtype(checkpoint, name) for name in names}),
        _one_dtype("optimizer's fp32 weights", {n: _master_dtype(checkpoint, n) for n in names}),
    )


def _names(checkpoint: Checkpoint, index: int, group: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of a param group's Parameters."""
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
                "For DeepSpeed, all Parameters of a param group must have the same optimizer "
                f"states, but `{names[0]}` has {_text(first)} and `{name}` has "
                f"{_text(states[name])}. Remove untrained Parameters from the param groups, or "
                "convert without optimizer state."
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
    """Returns the step count of the Parameter ``name`` as an int."""
    if not math.isfinite(step) or step != int(step) or step < 0:
        raise CheckpointError(
            f"The number of steps of `{name}` must be a whole number from 0 on, but is {step}."
        )
    return int(step)


def _states(checkpoint: Checkpoint) -> dict[str, dict[str, torch.dtype]]:
    """Returns the dtypes of each Parameter's optimizer states."""
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
        raise CheckpointError("A checkpoint for DeepSpeed must have Parameters, but has none.")
    first_name, first = next(iter(dtypes.items()))
    for name, dtype in dtypes.items():
        if dtype != first or dtype not in _DTYPES:
            raise CheckpointError(
                f"For DeepSpeed, the {what} must all have one dtype of "
                f"{[str(each) for each in _DTYPES]}, but `{first_name}` has {first} and `{name}` "
                f"has {dtype}. Choose one with `--dtype`."
            )
    return first


def _text(states: Mapping[str, torch.dtype]) -> str:
    return str({state: str(dtype) for state, dtype in states.items()}) if states else "none"
