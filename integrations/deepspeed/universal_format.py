"""The files of a universal checkpoint, as engines of every ZeRO stage read them.

A directory ``zero/<name>`` for each Parameter holds ``fp32.pt``, whole and in its logical shape,
and unless it was frozen ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``. DeepSpeed's own
converter writes this for ZeRO 1 and 2 only. ``zero/optimizer_state.pt`` has the hyperparameters
where ZeRO 1 and 2 look for them, and where ZeRO 3 does. What is not of one Parameter, as the step
count, the learning-rate schedule, the buffers and the client's state, is in a file for each
tensor-parallel rank, under the name that ZeRO 0 to 2 look for and under that of ZeRO 3.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import __version__ as deepspeed_version
from deepspeed.checkpoint.constants import (
    BUFFER_NAMES,
    DS_VERSION,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
    UNIVERSAL_CHECKPOINT_INFO,
)
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"

# Of the model's files, what is elsewhere in a universal checkpoint, or was of the source only.
_DROPPED = (
    "optimizer",
    "shared_params",
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    PARAM_SHAPES,
    UNIVERSAL_CHECKPOINT_INFO,
)


def load(path: Path) -> Any:
    """What DeepSpeed has saved as ``path``; of tensors, no more is read than is used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def parameters_of(universal: Path) -> dict[str, Path]:
    """The directory of each Parameter, by name."""
    return {path.name: path for path in sorted((universal / "zero").iterdir()) if path.is_dir()}


def read_tensor(directory: Path, key: str) -> Tensor:
    """The tensor ``key`` of the Parameter in ``directory``.

    :raises ValueError: the file is not as :func:`to_universal` writes it.
    """
    entry = load(directory / f"{key}.pt")
    if not isinstance(entry, dict) or PARAM not in entry:
        raise ValueError(
            f"`{directory / key}.pt` must hold a tensor in its logical shape, but is flat, as "
            "DeepSpeed's converter leaves it at ZeRO 3. Convert the checkpoint that it came from "
            "with `to_universal()`."
        )
    tensor: Tensor = entry[PARAM]
    return tensor.detach()


def write_tensor(directory: Path, key: str, tensor: Tensor) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({PARAM: tensor.detach().contiguous().clone()}, directory / f"{key}.pt")


def write_step(directory: Path, step: Any) -> None:
    """``step`` is a number or a tensor, as the optimizer has it."""
    torch.save(step.clone() if isinstance(step, Tensor) else step, directory / f"{STEP}.pt")


def read_step(directory: Path) -> Any:
    return torch.load(directory / f"{STEP}.pt", map_location="cpu", weights_only=False)


def optimizer_state_file(universal: Path) -> Path:
    return universal / "zero" / "optimizer_state.pt"


def write_optimizer_state(
    universal: Path,
    param_groups: Iterable[Mapping[str, Any]],
    step: Any,
    scalars: Mapping[str, Any],
) -> None:
    """:param scalars: the loss scale and the like."""
    groups = [{**hyperparameters(group), "params": []} for group in param_groups]
    state = {
        **scalars,
        DS_VERSION: deepspeed_version,
        PARAM_GROUPS: groups,
        OPTIMIZER_STATE_DICT: {"state": {0: {STEP: step}}, PARAM_GROUPS: groups},
    }
    torch.save(state, optimizer_state_file(universal))


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group of an optimizer without its Parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def model_file(directory: Path, tp_rank: int, stage: int) -> Path:
    """The file that an engine at ZeRO ``stage`` reads for a tensor-parallel rank."""
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    return directory / f"{prefix}mp_rank_{tp_rank:02d}_model_states.pt"


def check_adam(state: Mapping[str, Any]) -> None:
    """:raises ValueError: ``state`` is not that of Adam, the only one that universal checkpoints
    can hold."""
    expected = {STEP, *MOMENTS}
    if set(state) != expected:
        raise ValueError(
            f"The optimizer's state must be that of Adam, {sorted(expected)}, but is "
            f"{sorted(state)}. Universal checkpoints hold no other."
        )


def write_model_files(universal: Path, states: Iterable[Mapping[str, Any]]) -> None:
    """:param states: what the model's file of each tensor-parallel rank of the source holds."""
    for tp_rank, state in enumerate(states):
        kept = {key: value for key, value in state.items() if key not in _DROPPED}
        kept["module"] = {name: state["module"][name].clone() for name in state[BUFFER_NAMES]}
        for_zero3 = model_file(universal, tp_rank, 3)
        torch.save(kept, for_zero3)
        shutil.copy2(for_zero3, model_file(universal, tp_rank, 0))
