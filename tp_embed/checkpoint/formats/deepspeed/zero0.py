"""Reads the optimizer of an engine at ZeRO 0 from the model's file.

It is torch's state, indexed by number, so names must be found. Engines for 16-bit weights wrap it:
``FP16_UnfusedOptimizer`` keeps master weights one by one, ``FP16_Optimizer`` as flat tensors whose
layout it does not save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from ...contents import MASTER, Key, ReadOptions
from ...errors import CheckpointError
from ...files.arrays import Array
from .files import ModelFile, array_of, expect, scalars
from .fragments import Optimizers


def read_optimizer(
    model: ModelFile, parameters: Sequence[str], options: ReadOptions
) -> Optimizers | None:
    """Reads the optimizer of a tensor-parallel rank, if any.

    :param parameters: the names of all Parameters, in the order of the model.
    :raises CheckpointError: the names of the optimizer's Parameters are unknown, or do not match.
    """
    path = model.file.path
    saved = model.state.get("optimizer")
    if saved is None:
        return None
    expect(saved, dict, "`optimizer`", path)
    base, masters = saved, None
    if "optimizer_state_dict" in saved:
        base = expect(saved["optimizer_state_dict"], dict, "The state of the optimizer", path)
        masters = saved.get("fp32_groups")
        if masters is None:
            note = (
                "The state of the optimizer was left out: at ZeRO 0, DeepSpeed does not record the "
                "Parameters in its flat 16-bit groups. Train at ZeRO 1 to keep it."
            )
            return Optimizers(notes=[note])
    groups = [
        expect(group, dict, "A param group", path)
        for group in expect(base.get("param_groups"), list, "`param_groups`", path)
    ]
    names = _names(model, groups, parameters, options)
    found = Optimizers()
    found.scalars, found.notes = scalars(model.file, saved)
    if masters is not None:
        tensors = list(chain.from_iterable(expect(masters, list, "`fp32_groups`", path)))
        if len(tensors) != len(names):
            raise CheckpointError(
                f"`fp32_groups` in `{path}` must have {len(names)} tensors, one per Parameter in "
                f"the optimizer, but has {len(tensors)}."
            )
        for name, tensor in zip(names, tensors, strict=True):
            found.shards[Key(name, MASTER)] = _of_shape(model, name, MASTER, tensor)
    states = expect(base.get("state"), dict, "The state of the optimizer", path)
    for index, name in zip(_indices(groups, path), names, strict=True):
        for state, value in expect(states.get(index, {}), dict, "A state", path).items():
            if state == "step":
                found.steps[name] = model.file.number("A `step`", value)
            elif isinstance(value, Tensor) and (value.dim() or not model.shape(name)):
                key = Key(name, expect(state, str, "The name of a state", path))
                found.shards[key] = _of_shape(model, name, state, value)
    ordered = iter(names)
    for group in groups:
        found.add_group(model.file, group, [next(ordered) for _ in group["params"]])
    return found


def _indices(groups: Sequence[Mapping[str, Any]], path: Path) -> list[int]:
    indices = list(
        chain.from_iterable(expect(g.get("params"), list, "`params`", path) for g in groups)
    )
    if not all(type(index) is int for index in indices) or len(set(indices)) != len(indices):
        raise CheckpointError(f"The param groups in `{path}` must have different numbers.")
    return indices


def _names(
    model: ModelFile,
    groups: Sequence[Mapping[str, Any]],
    parameters: Sequence[str],
    options: ReadOptions,
) -> Sequence[str]:
    """Returns the names of the optimizer's Parameters, in its order."""
    path = model.file.path
    count = len(_indices(groups, path))
    names: Sequence[Any] | None = options.optimizer_names
    if names is None and all(isinstance(group.get("param_names"), list) for group in groups):
        names = list(chain.from_iterable(group["param_names"] for group in groups))
    if names is not None:
        unknown = [str(name) for name in names if name not in parameters]
        if unknown or len(set(names)) != count or len(names) != count:
            raise CheckpointError(
                f"The names of the optimizer's Parameters must be {count} different names in the "
                f"model, but are {len(names)}, with {unknown[:3]} unknown. Pass "
                "`--optimizer-names`."
            )
        return names
    if len(groups) != 1 or count != len(parameters):
        raise CheckpointError(
            f"The optimizer in `{path}` must have one param group with all {len(parameters)} "
            f"Parameters at ZeRO 0, but has {len(groups)} with {count}, without names. Pass "
            "`--optimizer-names`, the names of its Parameters in its order."
        )
    config = model.state.get("ds_config")
    if not isinstance(config, dict) or not isinstance(config.get("optimizer"), dict):
        raise CheckpointError(
            f"The optimizer in `{path}` must be built by DeepSpeed from its config at ZeRO 0, but "
            "is another, with unknown order. Pass `--optimizer-names`, the names of its Parameters "
            "in its order."
        )
    return parameters


def _of_shape(model: ModelFile, name: str, state: str, tensor: Any) -> Array:
    array = array_of(model.file, tensor, f"The state `{state}` of `{name}`")
    if array.shape != model.shape(name):
        raise CheckpointError(
            f"`{name}` in `{model.file.path}` must have an optimizer state of its shape "
            f"{model.shape(name)}, but the one at its index has {array.shape}. The optimizer has "
            "another order than the model: pass `--optimizer-names`, the names of its Parameters "
            "in its order."
        )
    return array
