"""Finds and opens the files of a Megatron-LM checkpoint, and merges pipeline stages. See
``get_checkpoint_name()``, ``read_metadata()`` and ``generate_state_dict()`` of
``megatron/training/checkpointing.py``."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, shown
from ...files.arrays import Array
from ...files.torch_file import TorchFile
from ..pt import state_dict_arrays
from ..rank_files import transpose

FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"
# Our addition to a file. Megatron ignores it, and drops it on saving.
OURS = "tp_embed"

_TAG = re.compile(r"(iter_)?(\d{1,18})|release", re.ASCII)
_RANK = re.compile(r"mp_rank_(\d{1,9})(?:_(\d{1,9}))?(_\d+)?", re.ASCII)
_LAYER = re.compile(r"((?:.*?\.)?layers\.)(\d{1,9})(\..*)", re.ASCII)
# `args` and states of random generators may contain instances of other classes. Megatron allows the
# ones in `megatron/core/safe_globals.py`; they move between its versions.
_HARMLESS = re.compile(r"(megatron|numpy|pathlib|signal)\..+|_io\.BytesIO|types\.SimpleNamespace")
_MAX_DEPTH = 16


class StandIn:
    """Stands in for an instance of another class. Runs no code."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


@dataclass(frozen=True)
class RankFile:
    """The content of a rank's file.

    :param chunks: flat state dicts of the model, one per virtual pipeline stage. Not all values
        are tensors.
    :param ours: our addition to the file.
    :param keys: all keys in the file.
    """

    file: TorchFile
    iteration: int | None
    version: float
    args: Mapping[str, Any]
    chunks: tuple[Mapping[str, Any], ...]
    ours: Mapping[str, Any]
    keys: frozenset[str]

    @property
    def path(self) -> Path:
        return self.file.path


def is_root(path: Path) -> bool:
    """Returns whether ``path`` looks like a directory of checkpoints, or of one iteration."""
    return (path / TRACKER).is_file() or any(path.glob(f"mp_rank_*/{FILE}"))


def directory_of(path: Path, tag: str | None) -> Path:
    """Returns the directory of the iteration that ``path`` and ``tag`` select.

    :raises CheckpointError: no such directory exists.
    """
    if not path.is_dir():
        raise CheckpointError(f"`{path}` must be a directory of Megatron-LM, but is a file.")
    if any(path.glob("mp_rank_*")):
        return path
    if tag is None and (path / TRACKER).is_file():
        with (path / TRACKER).open("rb") as file:
            tag = file.read(64).decode(errors="replace").strip()
    if tag is None:
        found = [each.name for each in path.iterdir() if _TAG.fullmatch(each.name)]
        if len(found) != 1:
            raise CheckpointError(
                f"`{path}` must have a `{TRACKER}` that says which iteration to take, but has none "
                f"and holds {sorted(found)}. Say which with `--tag`."
            )
        tag = found[0]
    match = _TAG.fullmatch(tag)
    if match is None:
        raise CheckpointError(
            f"The iteration in `{path}` must be `release` or a number, but is {tag!r}."
        )
    directory = path / (f"iter_{int(match[2]):07d}" if match[2] else "release")
    if not directory.is_dir():
        raise CheckpointError(
            f"`{path}` must hold `{directory.name}`, but does not. Copy the whole directory, or "
            "say which iteration to take with `--tag`."
        )
    return directory


def open_ranks(directory: Path, allow_unsafe: bool) -> list[list[RankFile]]:
    """Opens the files of each pipeline stage, by rank.

    :raises CheckpointError: files are missing, damaged, or do not match.
    """
    paths: dict[tuple[int, int], Path] = {}
    for each in sorted(directory.iterdir()):
        if (match := _RANK.fullmatch(each.name)) is None:
            continue
        place = int(match[2] or 0), int(match[1])
        if match[3] or place in paths:
            raise CheckpointError(
                f"`{directory}` must not be cut over expert-parallel ranks, but has `{each.name}`. "
                "Convert it with Megatron-LM first."
            )
        paths[place] = each / FILE
    if not paths:
        raise CheckpointError(
            f"`{directory}` must hold `mp_rank_00`, but does not. If Megatron-LM wrote it as "
            "`torch_dist` or `torch_dcp`, read this directory with `--from dcp`."
        )
    stages, ranks = (1 + max(place[axis] for place in paths) for axis in (0, 1))
    if len(paths) != stages * ranks:
        raise CheckpointError(
            f"`{directory}` must have a directory for each of {ranks} tensor-parallel ranks"
            f"{f' and {stages} pipeline stages' if stages > 1 else ''}, but has {len(paths)}: "
            f"{sorted(path.parent.name for path in paths.values())[:16]}. Copy the whole directory."
        )
    for path in paths.values():
        if not path.is_file():
            raise CheckpointError(f"`{path}` must be there, but is not. Copy the whole directory.")
    grid = [
        [_open(paths[stage, rank], allow_unsafe) for rank in range(ranks)]
        for stage in range(stages)
    ]
    _check_together([file for row in grid for file in row], ranks, stages)
    return grid


def merge_stages(
    grid: Sequence[Sequence[RankFile]],
) -> tuple[dict[str, list[Array]], dict[str, str], tuple[str, ...]]:
    """Merges the stages to one model. Returns each rank's arrays by name, ties, and notes.

    Each stage numbers its layers from 0. Virtual stages are interleaved: the first chunk of each
    stage, then the second of each.

    :raises CheckpointError: a name is in several stages, or layers are numbered otherwise.
    """
    merged: dict[str, list[Array]] = {}
    merged_ties: dict[str, str] = {}
    notes: dict[str, None] = {}
    offsets: dict[str, int] = {}
    num_chunks = len(grid[0][0].chunks)
    for chunk in range(num_chunks):
        for row in grid:
            ranks, ties = [], []
            for each in row:
                held = each.chunks[chunk]
                arrays, aliases = state_dict_arrays(each.file, _tensors(held))
                ranks.append({key.name: array for key, array in arrays.items()})
                ties.append(aliases)
                notes |= dict.fromkeys(_notes(held))
            if any(aliases != ties[0] for aliases in ties):
                raise CheckpointError(
                    f"`{row[0].path}` must have the same tied names as the other ranks, but has "
                    "others. All files must be from one checkpoint."
                )
            shards = transpose(ranks, [each.path for each in row])
            names = _renumber([*shards, *ties[0]], offsets, len(grid) * num_chunks > 1, row[0].path)
            for name, arrays_of_ranks in shards.items():
                if names[name] in merged:
                    raise CheckpointError(
                        f"`{names[name]}` must be in one pipeline stage, but is in several, up to "
                        f"`{row[0].path}`. Convert it with Megatron-LM first."
                    )
                merged[names[name]] = arrays_of_ranks
            merged_ties |= {names[alias]: names[name] for alias, name in ties[0].items()}
    return merged, merged_ties, tuple(notes)


def _open(path: Path, allow_unsafe: bool) -> RankFile:
    file = TorchFile(path, stand_ins=_stand_ins(path), allow_unsafe=allow_unsafe)
    root = file.root
    if not isinstance(root, Mapping):
        raise CheckpointError(f"`{path}` must hold a dict, but holds a {type(root).__name__}.")
    if "model" in root:
        chunks = [root["model"]]
    else:
        chunks = []
        for i in count():
            if f"model{i}" not in root:
                break
            chunks.append(root[f"model{i}"])
    if not chunks or not all(isinstance(chunk, Mapping) for chunk in chunks):
        raise CheckpointError(
            f"`{path}` must hold a state dict as `model`, or several as `model0` and so on, but "
            f"holds {[shown(key) for key in root][:16]}."
        )
    iteration, version = root.get("iteration"), root.get("checkpoint_version", 0)
    if not isinstance(iteration, int | None) or not isinstance(version, int | float):
        raise CheckpointError(
            f"The `iteration` and `checkpoint_version` of `{path}` must be numbers, but are "
            f"{shown(iteration)} and {shown(version)}."
        )
    return RankFile(
        file=file,
        iteration=iteration,
        version=version,
        args=_args(root.get("args"), path),
        chunks=tuple(dict(_flat(chunk, "", path)) for chunk in chunks),
        ours=ours if isinstance(ours := root.get(OURS), Mapping) else {},
        keys=frozenset(str(key) for key in root),
    )


def _stand_ins(path: Path) -> dict[str, type]:
    """Returns stand-ins for harmless classes in the file. None is imported."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # Opening the file reports the error.
        return {}
    harmless = {name for name in found if _HARMLESS.fullmatch(name)}
    return dict.fromkeys({"argparse.Namespace", *harmless}, StandIn)


def _args(args: Any, path: Path) -> dict[str, Any]:
    match args:
        case None:
            return {}
        case StandIn() | Namespace():
            return {key: value for key, value in vars(args).items() if isinstance(key, str)}
        case _:
            raise CheckpointError(
                f"`args` of `{path}` must be a namespace, but is a {type(args).__name__}."
            )


def _flat(held: Mapping[Any, Any], prefix: str, path: Path, depth: int = 0) -> Iterator[Any]:
    """Yields the items of a state dict, which may be nested, with their full names."""
    for key, value in held.items():
        if not isinstance(key, str) or depth == _MAX_DEPTH:
            raise CheckpointError(
                f"`{path}` must hold a state dict, but has {shown(key)!r} in {prefix!r}."
            )
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.", path, depth + 1)
        else:
            yield f"{prefix}{key}", value


def _tensors(held: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in held.items()
        if isinstance(value, Tensor) and not name.endswith("_extra_state")
    }


def _notes(held: Mapping[str, Any]) -> Iterator[str]:
    extra = [name for name in held if name.endswith("_extra_state")]
    if extra:
        yield (
            "The `_extra_state` of Transformer Engine was left out. It holds FP8 statistics, or "
            "nothing."
        )
    for name, value in held.items():
        if not isinstance(value, Tensor) and not name.endswith("_extra_state"):
            yield f"`{name}` is no tensor and was left out: {shown(value)}"


def _check_together(files: Sequence[RankFile], tp_size: int, stages: int) -> None:
    """Checks that ``files`` belong to one checkpoint.

    :raises CheckpointError: they do not.
    """
    for each in files:
        for what in ("iteration", "version"):
            first, other = getattr(files[0], what), getattr(each, what)
            if first != other:
                raise CheckpointError(
                    f"`{each.path}` must have the same {what} as `{files[0].path}`, but has "
                    f"{other} instead of {first}. All files must be from one checkpoint."
                )
        if len(each.chunks) != len(files[0].chunks) or str(each.ours) != str(files[0].ours):
            raise CheckpointError(
                f"`{each.path}` must be from the same checkpoint as `{files[0].path}`, but is not."
            )
        sizes = {
            "tensor_model_parallel_size": tp_size,
            "pipeline_model_parallel_size": stages,
            "expert_model_parallel_size": 1,
        }
        for name, size in sizes.items():
            if isinstance(found := each.args.get(name), int) and found != size:
                raise CheckpointError(
                    f"`args.{name}` of `{each.path}` must be {size}, to match the files, but is "
                    f"{found}. Copy the whole directory; expert-parallel ranks are not supported."
                )


def _renumber(
    names: Iterable[str], offsets: dict[str, int], several: bool, path: Path
) -> dict[str, str]:
    """Maps names in a stage to names in the whole model. Adds the stage's layers to ``offsets``,
    the number of layers in earlier stages.

    :param several: the stage is one of several.
    """
    whole = {}
    indices: dict[str, set[int]] = {}
    for name in names:
        whole[name] = name
        if match := _LAYER.fullmatch(name):
            layers, index = match[1], int(match[2])
            indices.setdefault(layers, set()).add(index)
            if offsets.get(layers):
                whole[name] = f"{layers}{offsets[layers] + index}{match[3]}"
    for layers, found in indices.items():
        if several and len(found) != 1 + max(found):
            raise CheckpointError(
                f"The pipeline stage of `{path}` must have all its `{layers}` numbered from 0, but "
                f"has {sorted(found)[:16]}. Convert it with Megatron-LM first."
            )
        offsets[layers] = offsets.get(layers, 0) + 1 + max(found)
    return whole
