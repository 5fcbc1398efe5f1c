"""Universal checkpoints of ZeRO 0, which DeepSpeed's converter does not know.

There the optimizer is that of torch: its state is by index, and the names have to be found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import BUFFER_NAMES, PARAM_GROUPS
from torch import Tensor

from .layout import CheckpointLayout
from .universal_format import (
    MOMENTS,
    STEP,
    check_adam,
    write_optimizer_state,
    write_step,
    write_tensor,
)


def convert_zero0(
    states: Sequence[Mapping[str, Any]],
    layout: CheckpointLayout,
    universal: Path,
    optimizer_names: Sequence[str] | None,
) -> None:
    """:param states: what the model's file of each tensor-parallel rank holds."""
    optimizer = states[0]["optimizer"]
    if optimizer is None or set(optimizer) != {"state", PARAM_GROUPS}:
        held = "none" if optimizer is None else "one for 16-bit Parameters"
        raise ValueError(
            "The checkpoint must hold the state of an optimizer in fp32, if it is of ZeRO 0, but "
            f"holds {held}. Train at ZeRO 1, which keeps its state in a form that can be converted."
        )
    for state in optimizer["state"].values():
        check_adam(state)
    if not optimizer["state"]:
        raise ValueError("The checkpoint must hold an optimizer that has made a step, but has not.")

    names = _parameter_names(states[0])
    made_by_deepspeed = bool((states[0].get("ds_config") or {}).get("optimizer"))
    trained = _optimizer_names(optimizer, names, optimizer_names, made_by_deepspeed)
    indices = dict(zip(trained, _indices(optimizer), strict=True))
    last_step = max((state[STEP] for state in optimizer["state"].values()), key=float)
    for name in names:
        directory = universal / "zero" / name
        shards = [state["module"][name] for state in states]
        write_tensor(directory, "fp32", layout.merge(name, "fp32", shards).float())
        if name in indices:
            index = indices[name]
            for key in MOMENTS:
                parts = [
                    _moment(state["optimizer"], index, key, name, shard)
                    for state, shard in zip(states, shards, strict=True)
                ]
                write_tensor(directory, key, layout.merge(name, key, parts))
            write_step(directory, optimizer["state"].get(index, {}).get(STEP, last_step))
    write_optimizer_state(universal, optimizer[PARAM_GROUPS], last_step, {})


def _parameter_names(state: Mapping[str, Any]) -> list[str]:
    """The Parameters of a model in its order, each by the first of its names."""
    seen = set()
    names = []
    for name, value in state["module"].items():
        if name in state[BUFFER_NAMES] or not isinstance(value, Tensor):
            continue
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        if place not in seen:
            seen.add(place)
            names.append(name)
    return names


def _indices(optimizer: Mapping[str, Any]) -> list[int]:
    return list(chain.from_iterable(group["params"] for group in optimizer[PARAM_GROUPS]))


def _optimizer_names(
    optimizer: Mapping[str, Any],
    names: Sequence[str],
    given: Sequence[str] | None,
    made_by_deepspeed: bool,
) -> Sequence[str]:
    """The names of the optimizer's Parameters, in its order."""
    count = len(_indices(optimizer))
    groups = optimizer[PARAM_GROUPS]
    if given is not None:
        unknown = sorted(set(given) - set(names))
        if unknown or len(set(given)) != count:
            raise ValueError(
                f"`optimizer_names` must be {count} different names of {list(names)}, but are "
                f"{len(given)} names, of which {unknown} are unknown."
            )
        return given
    if all("param_names" in group for group in groups):
        return list(chain.from_iterable(group["param_names"] for group in groups))
    if len(groups) != 1 or count != len(names):
        raise ValueError(
            f"The checkpoint must have one param group with all {len(names)} Parameters, if it is "
            f"of ZeRO 0, but has {len(groups)} with {count}, and does not say which. Pass "
            "`optimizer_names`, the names of the optimizer's Parameters in its order."
        )
    if not made_by_deepspeed:
        raise ValueError(
            "The optimizer must be one that DeepSpeed has made by its config, if it is of ZeRO 0, "
            "but is another, of which the order is not known. Pass `optimizer_names`, the names of "
            "its Parameters in its order."
        )
    return names


def _moment(optimizer: Mapping[str, Any], index: int, key: str, name: str, shard: Tensor) -> Tensor:
    """A moment of a rank's shard; zero for a Parameter that has never had a gradient."""
    state = optimizer["state"].get(index)
    if state is None:
        return torch.zeros_like(shard)
    moment: Tensor = state[key]
    if moment.shape != shard.shape:
        raise ValueError(
            f"`{name}` must have an optimizer state of its shape {tuple(shard.shape)}, but the one "
            f"in its place has {tuple(moment.shape)}. The optimizer has another order than the "
            "model: pass `optimizer_names`, the names of its Parameters in its order."
        )
    return moment
