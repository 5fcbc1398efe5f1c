"""Reads and writes the tensors of universal checkpoints, for engines and resized vocabularies.

See :mod:`tp_embed.checkpoint.formats.universal.paths` for the layout of the files.
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
    """Loads ``path`` without running code from it; maps tensors, so reads only what is used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def find_universal(directory: Path, tag: str | None = None) -> Path:
    """Returns the directory of the universal checkpoint ``tag`` in ``directory``. ``tag`` defaults
    to the one in the file ``latest_universal``."""
    if tag is None:
        file = directory / LATEST
        if not file.is_file():
            raise FileNotFoundError(
                f"`{directory}` must have a file `{LATEST}`, which `to_universal()` writes, but "
                "has none. Convert the engine's checkpoint, or pass its `tag`."
            )
        tag = read_latest(file)
    if not is_universal(directory / tag):
        raise ValueError(
            f"`{directory / tag}` must be a universal checkpoint that `to_universal()` has "
            "written, but has no directory `zero`. Convert the engine's checkpoint."
        )
    return directory / tag


def read_tensor(parameter: Path, key: str) -> Tensor:
    """Reads the tensor ``key`` of the Parameter in the directory ``parameter``.

    :raises ValueError: the file is not as :func:`to_universal` writes it.
    """
    file = state_file(parameter, key)
    entry = load(file)
    if not isinstance(entry, dict) or PARAM not in entry:
        raise ValueError(
            f"`{file}` must hold a tensor in its logical shape, but is flat, as DeepSpeed's "
            "converter leaves it at ZeRO 3. Convert the original checkpoint with "
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
