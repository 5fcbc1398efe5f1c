"""Opens the files of a universal checkpoint and checks their content."""

from __future__ import annotations

import math
import re
from pathlib import Path

from torch import Tensor

from ...contents import ReadOptions
from ...errors import CheckpointError
from ...files.arrays import Array, View
from ...files.torch_file import TorchFile
from ..deepspeed.files import STAND_INS, Saved, array_of, open_tag, read_latest, refuse_others
from . import paths
from .paths import LATEST, is_universal

_MODEL_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")


def locate(path: Path, options: ReadOptions) -> Path:
    """Returns the directory of a universal checkpoint: ``path``, or the tagged one in it.

    :raises CheckpointError: no such directory exists.
    :raises UnsafeCheckpointError: the file ``latest_universal`` points outside ``path``.
    """
    if is_universal(path):
        return path
    tag, named_by = options.tag, "`--tag`"
    if tag is None:
        file = path / LATEST
        if not file.is_file():
            raise CheckpointError(
                f"`{path}` must be a universal checkpoint, with a directory `zero`, or have a file "
                f"`{LATEST}` that names one in it, but has neither."
            )
        tag, named_by = read_latest(file), f"`{file}`"
    directory = path / tag
    if not is_universal(directory):
        raise CheckpointError(
            f"{named_by} must name a universal checkpoint in `{path}`, but `{directory}` has no "
            "directory `zero`. Copy the whole checkpoint, or name another with `--tag`."
        )
    return directory


def open_ranks(directory: Path, options: ReadOptions) -> list[Saved]:
    """Opens the model files for engines at ZeRO 0 to 2, at ZeRO 3, or both.

    :raises CheckpointError: they are missing, damaged, or do not match.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    refuse_others(directory, names)
    kinds: dict[bool, list[str]] = {}
    for name in names:
        if match := _MODEL_FILE.fullmatch(name):
            kinds.setdefault(match[1] is not None, []).append(name)
    if not kinds:
        raise CheckpointError(
            f"`{directory}` must have a file `mp_rank_*_model_states.pt` for each tensor-parallel "
            f"rank, but has {names[:3]}. Copy the whole checkpoint."
        )
    found = [open_tag(directory, options, kind) for kind in kinds.values()]
    steps = [saved.models[0][0].state.get("global_steps") for saved in found]
    sizes = [saved.tp_size for saved in found]
    if len(set(steps)) > 1 or len(set(sizes)) > 1:
        raise CheckpointError(
            f"The files `mp_rank_*` and `zero_pp_rank_*` of `{directory}` must have one step and "
            f"number of ranks, but have the steps {steps} and {sizes} tensor-parallel ranks. "
            "Copy all files of one checkpoint."
        )
    return found


def open_file(path: Path, options: ReadOptions) -> TorchFile:
    """Opens a file.

    :raises CheckpointError: it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There must be a file `{path}`, but there is none. Copy the whole checkpoint."
        )
    return TorchFile(path, stand_ins=STAND_INS, allow_unsafe=options.allow_unsafe_pickle)


def read_entry(file: TorchFile, flat_shape: tuple[int, ...] | None) -> Array:
    """Returns the whole tensor in the file of a Parameter, in its logical shape.

    :param flat_shape: the logical shape of a tensor that DeepSpeed has left flat, if known.
    """
    match file.root:
        case Tensor() as tensor:
            if flat_shape is None:
                raise CheckpointError(
                    f"`{file.path}` must hold a tensor in its logical shape, or the model files "
                    "must say the shape, but it is flat. Convert the engine's checkpoint again."
                )
        case {"is_expert_param": is_expert} if is_expert:
            raise CheckpointError(
                f"`{file.path}` must hold a Parameter that all ranks have, but holds experts."
            )
        case {paths.PARAM: Tensor() as tensor}:
            flat_shape = None
        case other:
            raise CheckpointError(
                f"`{file.path}` must hold a tensor, but holds {str(other)[:100]}. The file is "
                "damaged: copy it again."
            )
    array = array_of(file, tensor, "The tensor")
    if not array.dtype.is_floating_point:
        raise CheckpointError(
            f"`{file.path}` must hold a floating-point tensor, but holds one of {array.dtype}."
        )
    if flat_shape is None:
        return array
    if array.shape != (math.prod(flat_shape),):
        raise CheckpointError(
            f"`{file.path}` must hold the elements of a tensor of shape {flat_shape}, as the model "
            f"files say, but holds {array.shape}. Copy all files of one checkpoint."
        )
    return View(array, flat_shape)
