"""The files that ``engine.save_checkpoint()`` writes for one tag, and what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BUFFER_NAMES,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    PARAM_SHAPES,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from torch import Tensor

from .layout import CheckpointLayout
from .universal_format import load

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class SavedCheckpoint:
    """The checkpoint of one tag, of any ZeRO stage.

    ``model_files`` are those of each tensor-parallel rank: one, or at ZeRO 3 one for each of its
    data-parallel ranks. ``states`` is what the first of each holds.
    """

    model_files: list[list[Path]]
    optimizer_files: list[Path]
    states: list[dict[str, Any]]

    @staticmethod
    def read(directory: Path) -> SavedCheckpoint:
        if not directory.is_dir():
            raise FileNotFoundError(
                f"`source` must be the directory of a checkpoint, but there is no `{directory}`."
            )
        if (directory / "zero").is_dir():
            raise ValueError(
                f"`source` must be a checkpoint of an engine, but `{directory}` is universal "
                "already. Load it with `load_universal()`."
            )
        names = sorted(path.name for path in directory.iterdir())
        if special := [name for name in names if name.startswith("layer_") or "expert" in name]:
            raise ValueError(
                "`source` must be a checkpoint without pipeline stages and experts, but "
                f"`{directory}` has `{special[0]}`. Convert it with DeepSpeed's `ds_to_universal`."
            )
        model_files = _model_files(directory, names)
        return SavedCheckpoint(
            model_files,
            [directory / name for name in names if name.endswith("_optim_states.pt")],
            [load(files[0]) for files in model_files],
        )

    @property
    def info(self) -> dict[str, Any]:
        """How the Parameters are cut, for DeepSpeed's converter."""
        info = self.states[0].get(UNIVERSAL_CHECKPOINT_INFO)
        if info is None and len(self.states) > 1:
            raise ValueError(
                "The checkpoint must say how its Parameters are cut over the "
                f"{len(self.states)} tensor-parallel ranks, but its model files have no "
                f"`{UNIVERSAL_CHECKPOINT_INFO}`. AutoTP writes it, and so does "
                "`shard_embeddings()` over a `DeepSpeedGang`, where it finds tables to shard."
            )
        if info is None:
            return {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        return dict(info)

    @property
    def layout(self) -> CheckpointLayout:
        return CheckpointLayout(self.info, len(self.states))

    @property
    def trained(self) -> list[str]:
        """The names of what the optimizer holds. A rank has none of its empty shards."""
        return list(
            dict.fromkeys(name for state in self.states for name in optimizer_shapes(state))
        )

    def frozen(self) -> dict[str, list[Tensor]]:
        """The shard of each tensor-parallel rank of the Parameters that are not trained."""
        state, module = self.states[0], self.states[0]["module"]
        names: list[str]
        if state[FROZEN_PARAM_SHAPES] is not None:
            names = [name for name in state[FROZEN_PARAM_SHAPES] if name not in self.trained]
        else:  # At ZeRO 0 and 1.
            others = {*self.trained, *state[BUFFER_NAMES], *state["shared_params"]}
            known = {_storage(module[name]) for name in others if name in module}
            names = [
                name
                for name, value in module.items()
                if name not in others
                and isinstance(value, Tensor)
                # A module with two names has one that is in none of these lists.
                and _storage(value) not in known
            ]
        if self.model_files[0][0].name.startswith("mp_rank"):
            return {name: [state["module"][name] for state in self.states] for name in names}
        return {
            name: [_join_fragments(name, files) for files in self.model_files] for name in names
        }


def _storage(tensor: Tensor) -> object:
    """The same for tensors that are one, which empty ones never are."""
    return tensor.untyped_storage().data_ptr() if tensor.numel() else object()


def _model_files(directory: Path, names: Sequence[str]) -> list[list[Path]]:
    """The file of each tensor-parallel rank, and at ZeRO 3 of each data-parallel rank of it."""
    grid = {}
    for name in names:
        if match := _MODEL_FILE.fullmatch(name):
            grid[int(match[2]), int(match[1] or 0)] = directory / name
    if not grid:
        tags = {path.parent.name for path in directory.glob("*/*_model_states.pt")}
        hint = f" Take one of its tags: {sorted(tags)}." if tags else ""
        raise FileNotFoundError(
            "`source` must be the directory of one tag, with a file `*_model_states.pt` for "
            f"each rank, but `{directory}` has none.{hint}"
        )
    tp_size, dp_size = (max(ranks) + 1 for ranks in zip(*grid, strict=True))
    for tp_rank in range(tp_size):
        for dp_rank in range(dp_size):
            if (tp_rank, dp_rank) not in grid:
                raise FileNotFoundError(
                    f"`{directory}` must have model files for {tp_size} tensor-parallel x "
                    f"{dp_size} data-parallel ranks, but that of tensor-parallel rank {tp_rank} "
                    f"and data-parallel rank {dp_rank} is missing."
                )
    return [[grid[tp_rank, dp_rank] for dp_rank in range(dp_size)] for tp_rank in range(tp_size)]


def optimizer_shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the shards of a rank that the optimizer holds."""
    return {name: tuple(shape) for group in state[PARAM_SHAPES] for name, shape in group.items()}


def _join_fragments(name: str, files: Sequence[Path]) -> Tensor:
    """A frozen shard, from its fragments in the files of the data-parallel ranks."""
    states = [load(file) for file in files]
    shape = states[0][FROZEN_PARAM_SHAPES][name]
    flat = torch.cat([state[FROZEN_PARAM_FRAGMENTS][name].flatten() for state in states])
    return flat[: shape.numel()].view(shape)
