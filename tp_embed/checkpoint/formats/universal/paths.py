"""Paths in a universal checkpoint, as engines of every ZeRO stage read them.

A directory ``zero/<name>`` for each Parameter holds ``fp32.pt``, whole and in its logical shape,
and unless it was frozen ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``. DeepSpeed's own
converter writes this for ZeRO 1 and 2 only. ``zero/optimizer_state.pt`` has the hyperparameters
both where ZeRO 1 and 2 expect them, and where ZeRO 3 does. State shared by all Parameters, such as
the step count, the learning-rate schedule, the buffers and the client's state, is in one file per
tensor-parallel rank, under the name that ZeRO 0 to 2 expect, and again under ZeRO 3's.
"""

from __future__ import annotations

from pathlib import Path

LATEST = "latest_universal"
OPTIMIZER_STATE = "optimizer_state.pt"
STEP = "step"
PARAM = "param"  # The tensor in a state's file, next to its cut.

_ZERO = "zero"


def is_universal(directory: Path) -> bool:
    """Returns whether ``directory`` is a universal checkpoint."""
    return (directory / _ZERO).is_dir()


def parameters_of(directory: Path) -> dict[str, Path]:
    """Maps names of Parameters to their directories."""
    return {path.name: path for path in sorted((directory / _ZERO).iterdir()) if path.is_dir()}


def files_of_parameters(directory: Path) -> list[Path]:
    """Returns all files in ``zero``, including the optimizer's."""
    return sorted((directory / _ZERO).glob("**/*.pt"))


def parameter_directory(directory: Path, name: str) -> Path:
    """Returns the directory with the states of the Parameter ``name``."""
    return directory / _ZERO / name


def state_file(parameter: Path, state: str) -> Path:
    """Returns the file of a state, or of the step, in the directory of a Parameter."""
    return parameter / f"{state}.pt"


def optimizer_state_file(directory: Path) -> Path:
    """Returns the file with the optimizer's param groups."""
    return directory / _ZERO / OPTIMIZER_STATE


def model_file(directory: Path, tp_rank: int, stage: int) -> Path:
    """Returns the file that an engine at ZeRO ``stage`` reads for a tensor-parallel rank."""
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    return directory / f"{prefix}mp_rank_{tp_rank:02d}_model_states.pt"
