"""The files of a universal checkpoint, and what of their content can be relied on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arrays import Array, Joined, Tile, View
from ..errors import CheckpointError, UnsafeCheckpointError
from ..logical import ReadOptions
from ..torch_file import TorchFile
from .deepspeed.files import STAND_INS, Saved, array_of, expect, open_tag

LATEST = "latest_universal"
OPTIMIZER_STATE = "optimizer_state.pt"
STEP = "step"

# Of a model file, what is not of the training run, or is elsewhere in a checkpoint.
STRUCTURE = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "universal_checkpoint_info",
    "global_steps",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
}
# Of the file of the optimizer, what is not of one Parameter. The loss scale is left out: it is an
# object, and an engine has its own.
OPTIMIZER_SCALARS = ("clip_grad",)

# Of a training run there are some hundreds.
_MAX_VALUES = 100_000

_MODEL_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")


def locate(path: Path, options: ReadOptions) -> Path:
    """The directory of a universal checkpoint: ``path``, or the one in it that a tag names.

    :raises CheckpointError: there is none.
    :raises UnsafeCheckpointError: the file ``latest_universal`` leads out of ``path``.
    """
    if (path / "zero").is_dir():
        return path
    tag, named_by = options.tag, "`--tag`"
    if tag is None:
        file = path / LATEST
        if not file.is_file():
            raise CheckpointError(
                f"`{path}` must be a universal checkpoint, with a directory `zero`, or have a file "
                f"`{LATEST}` that names one in it, but has neither."
            )
        with file.open("rb") as opened:
            tag = opened.read(4096).decode(errors="replace").strip()
        named_by = f"`{file}`"
    if not tag or tag != Path(tag).name or tag == ".." or "\0" in tag:
        raise UnsafeCheckpointError(
            f"{named_by} must be the name of a directory in `{path}`, but is {tag[:255]!r}."
        )
    directory = path / tag
    if not (directory / "zero").is_dir():
        raise CheckpointError(
            f"{named_by} must name a universal checkpoint in `{path}`, but `{directory}` has no "
            "directory `zero`. Copy the whole checkpoint, or name another with `--tag`."
        )
    return directory


def open_ranks(directory: Path, options: ReadOptions) -> list[Saved]:
    """The model files: those for engines of ZeRO 0 to 2, or for ZeRO 3, or of each kind.

    :raises CheckpointError: they are missing, or damaged, or do not go together.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    special = [name for name in names if name.startswith("layer_") or "expert" in name]
    kinds: dict[bool, list[str]] = {}
    for name in names:
        if match := _MODEL_FILE.fullmatch(name):
            kinds.setdefault(match[1] is not None, []).append(name)
    if special or not kinds:
        raise CheckpointError(
            f"`{directory}` must have a file `mp_rank_*_model_states.pt` for each tensor-parallel "
            "rank, and be of a model without pipeline stages and experts, but has "
            f"{special[:1] or names[:3]}. Copy the whole checkpoint."
        )
    found = [open_tag(directory, options, kind) for kind in kinds.values()]
    steps = [saved.models[0][0].state.get("global_steps") for saved in found]
    sizes = [saved.tp_size for saved in found]
    if len(set(steps)) > 1 or len(set(sizes)) > 1:
        raise CheckpointError(
            f"The files `mp_rank_*` and `zero_pp_rank_*` of `{directory}` must be of one step and "
            f"number of ranks, but are of the steps {steps} and {sizes} tensor-parallel ranks. "
            "Copy all files of one checkpoint."
        )
    return found


def open_file(path: Path, options: ReadOptions) -> TorchFile:
    """:raises CheckpointError: it is not there, or damaged."""
    if not path.is_file():
        raise CheckpointError(
            f"There must be a file `{path}`, but there is none. Copy the whole checkpoint."
        )
    return TorchFile(path, stand_ins=STAND_INS, allow_unsafe=options.allow_unsafe_pickle)


def read_entry(file: TorchFile, flat_shape: tuple[int, ...] | None) -> Array:
    """The whole tensor that is in the file of a Parameter, in its logical shape.

    :param flat_shape: that shape, for a tensor that DeepSpeed has left flat; ``None`` if it is not
        known.
    """
    match file.root:
        case Tensor() as tensor:
            if flat_shape is None:
                raise CheckpointError(
                    f"`{file.path}` must hold a tensor in its logical shape, or the model files "
                    "must say it, but it is flat. Convert the engine's checkpoint again."
                )
        case {"is_expert_param": is_expert} if is_expert:
            raise CheckpointError(
                f"`{file.path}` must be of a Parameter that all ranks have, but is of experts."
            )
        case {"param": Tensor() as tensor}:
            flat_shape = None
        case other:
            raise CheckpointError(
                f"`{file.path}` must hold a tensor, but holds {str(other)[:100]}. The file is "
                "damaged: copy it again."
            )
    array = array_of(file, tensor, "The tensor")
    if not array.dtype.is_floating_point:
        raise CheckpointError(
            f"`{file.path}` must hold a tensor of floating point, but holds one of {array.dtype}."
        )
    if flat_shape is None:
        return array
    if array.shape != (math.prod(flat_shape),):
        raise CheckpointError(
            f"`{file.path}` must hold the elements of a tensor of shape {flat_shape}, as the model "
            f"files say, but holds {array.shape}. Copy all files of one checkpoint."
        )
    return View(array, flat_shape)


def read_frozen(saved: Saved, name: str) -> list[Array]:
    """The shard of each tensor-parallel rank of a Parameter that ZeRO 3 has frozen, from the
    fragments of its data-parallel ranks."""
    shards: list[Array] = []
    for models in saved.models:
        tiles, size = [], 0
        for model in models:
            what = f"`{name}` in `frozen_param_fragments`"
            fragments = model.state.get("frozen_param_fragments")
            fragment = expect(fragments, Mapping, what, model.file.path).get(name)  # type: ignore[type-abstract]
            array = array_of(model.file, fragment, what)
            tiles.append(Tile.whole((size,), View(array, (array.numel,))))
            size += array.numel
        flat = Joined((size,), tiles[0].array.dtype, tiles)
        shards.append(View(flat, models[0].shape(name)))
    return shards


def read_number(what: str, file: TorchFile, value: Any) -> float:
    """``value``, a number or a tensor of one, which must be finite and not negative."""
    if _is_number(value):
        value = file.value(value).item()
    if type(value) in (int, float) and 0 <= value < math.inf:
        return float(value)
    raise CheckpointError(
        f"{what} in `{file.path}` must be a number of at least 0, but is {str(value)[:100]}. The "
        "file is damaged: copy it again."
    )


def plain(file: TorchFile, value: Any) -> Any:
    """``value`` if it consists of plain Python values only; a tensor of one number as this.

    :raises ValueError: it does not.
    """
    return _plain(file, value, iter(range(_MAX_VALUES)), 100)


def _plain(file: TorchFile, value: Any, budget: Iterator[int], depth: int) -> Any:
    # A file can say in few bytes what is endless, or nearly so.
    if next(budget, None) is None or not depth:
        raise ValueError(f"more than {_MAX_VALUES} values")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if _is_number(value):
        return file.value(value).item()
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(_plain(file, each, budget, depth - 1) for each in value)
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {key: _plain(file, each, budget, depth - 1) for key, each in value.items()}
    raise ValueError(f"a {type(value).__name__}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.layout == torch.strided
