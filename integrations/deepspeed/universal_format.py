"""The files of a universal checkpoint, as engines of every ZeRO stage read them.

A directory ``zero/<name>`` for each Parameter holds ``fp32.pt``, whole and in its logical shape,
and unless it was frozen ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``. DeepSpeed's own
converter writes this for ZeRO 1 and 2 only. ``zero/optimizer_state.pt`` has the hyperparameters
where ZeRO 1 and 2 look for them, and where ZeRO 3 does. What is not of one Parameter, as the step
count, the learning-rate schedule, the buffers and the client's state, is in a file for each
tensor-parallel rank, under the name that ZeRO 0 to 2 look for and under that of ZeRO 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
PARAM = "param"
LATEST = "latest_universal"


def load(path: Path) -> Any:
    """What is saved as ``path``; of tensors, no more is read than is used, and no code is run."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def find_universal(directory: Path, tag: str | None = None) -> Path:
    """The directory of the universal checkpoint ``tag`` in ``directory``, or of the one that the
    file ``latest_universal`` names."""
    if tag is None:
        file = directory / LATEST
        if not file.is_file():
            raise FileNotFoundError(
                f"`{directory}` must have a file `{LATEST}`, which `to_universal()` writes, but "
                "has none. Convert the engine's checkpoint, or say the `tag` in it."
            )
        tag = file.read_text().strip()
    if not (directory / tag / "zero").is_dir():
        raise ValueError(
            f"`{directory / tag}` must be a universal checkpoint that `to_universal()` has "
            "written, but has no directory `zero`. Convert the engine's checkpoint."
        )
    return directory / tag


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


def read_step(directory: Path) -> Any:
    return load(directory / f"{STEP}.pt")


def optimizer_state_file(universal: Path) -> Path:
    return universal / "zero" / "optimizer_state.pt"


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group of an optimizer without its Parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def model_file(directory: Path, tp_rank: int, stage: int) -> Path:
    """The file that an engine at ZeRO ``stage`` reads for a tensor-parallel rank."""
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    return directory / f"{prefix}mp_rank_{tp_rank:02d}_model_states.pt"
