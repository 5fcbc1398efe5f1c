"""Reads and writes the tensors of universal checkpoints, for engines and resized vocabularies.

Where they are is in :mod:`tp_embed.checkpoint.formats.universal.paths`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_embed.checkpoint.formats.deepspeed.files import read_latest
from tp_embed.checkpoint.formats.universal.paths import (
    LATEST,
    PARAM,
    STEP,
    is_universal,
    state_file,
)


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
        tag = read_latest(file)
    if not is_universal(directory / tag):
        raise ValueError(
            f"`{directory / tag}` must be a universal checkpoint that `to_universal()` has "
            "written, but has no directory `zero`. Convert the engine's checkpoint."
        )
    return directory / tag


def read_tensor(parameter: Path, key: str) -> Tensor:
    """The tensor ``key`` of the Parameter in the directory ``parameter``.

    :raises ValueError: the file is not as :func:`to_universal` writes it.
    """
    file = state_file(parameter, key)
    entry = load(file)
    if not isinstance(entry, dict) or PARAM not in entry:
        raise ValueError(
            f"`{file}` must hold a tensor in its logical shape, but is flat, as DeepSpeed's "
            "converter leaves it at ZeRO 3. Convert the checkpoint that it came from with "
            "`to_universal()`."
        )
    tensor: Tensor = entry[PARAM]
    return tensor.detach()


def write_tensor(parameter: Path, key: str, tensor: Tensor) -> None:
    """Writes ``tensor`` as DeepSpeed writes a state of a Parameter: ``parameter/key.pt``."""
    parameter.mkdir(parents=True, exist_ok=True)
    torch.save({PARAM: tensor.detach().contiguous().clone()}, state_file(parameter, key))


def read_step(parameter: Path) -> Any:
    """Reads the step of the optimizer from the directory of a Parameter."""
    return load(state_file(parameter, STEP))
