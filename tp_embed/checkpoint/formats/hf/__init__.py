"""Reads and writes directories of Hugging Face transformers, with weights as safetensors.

They hold ``model.safetensors``, or several files and an index
(https://huggingface.co/docs/transformers/big_models)::

    model.safetensors.index.json:
        {"metadata": {"total_size": BYTES}, "weight_map": {NAME: FILE, ...}}

We also read the older ``pytorch_model.bin`` in the same two forms, and single safetensors files.

**Tied weights.** The metadata of a file lists the other names of its tensors, as
``safetensors.torch.save_model()`` does. ``from_pretrained()`` ignores it: it ties word embeddings
if ``config.json`` says ``tie_word_embeddings``. So tied tables are written once if it says so. All
other tied weights are written under each name, since ``from_pretrained()`` would initialize a
missing name with random values.

**Settings.** ``config.json``, the tokenizer and similar files, but no code, are copied from
`Target.hf_config`, else from the source if it is such a directory. The dtype in ``config.json`` is
set to the weights' dtype. If padding was dropped, ``vocab_size`` in the source's ``config.json`` is
set to the number of rows; ``vocab_size`` in `Target.hf_config` must already match.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...contents import WEIGHT, Checkpoint, Key, Output, ReadOptions, Target
from ...cuts import is_table
from ...errors import CheckpointError, shown
from ...files import safetensors_file
from ...files.arrays import Array, Index
from ...files.derived import Copies
from ...files.text_files import inside, read_json, write_json
from ...files.torch_file import TorchFile
from ..pt import state_dict_arrays
from .settings import CONFIG, copy_settings, settings_of, ties_words

NAME = "hf"
IS_FILE = False
HAS_RANKS = False
HAS_OPTIMIZER = False
HAS_EXTRA = False
MAIN = WEIGHT

_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"  # Read only.


_NOT_ONE = "They are not one Parameter: save the checkpoint again."


class _File(NamedTuple):
    """The content of a file with weights.

    :param names: all names of tensors in the file, including ties.
    :param ties: maps other names of tensors to their main names.
    """

    tensors: dict[str, Array]
    names: set[str]
    ties: dict[str, str]
    notes: list[str]


def recognises(path: Path) -> bool:
    """Returns whether ``path`` is a Hugging Face model directory, or a safetensors file."""
    if path.is_dir():
        return any(
            (path / f"{name}{index}").is_file()
            for name in (_SAFETENSORS, _TORCH)
            for index in ("", ".index.json")
        )
    return path.is_file() and path.suffix == ".safetensors"


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Reads the weights of one file, or of all files in an index.

    :raises CheckpointError: the index and its files do not match.
    """
    found = _find(path)
    if found.name.endswith(".index.json"):
        index = read_json(found)
        weight_map = _weight_map(found, index)
        files = {file: _read_file(file, options) for file in dict.fromkeys(weight_map.values())}
        _check_weight_map(found, weight_map, files)
        _check_total_size(found, index, files)
    else:
        files = {found: _read_file(found, options)}
    tensors = {name: array for file in files.values() for name, array in file.tensors.items()}
    claims = {alias: name for file in files.values() for alias, name in file.ties.items()}
    ties = {a: name for a, name in claims.items() if name in tensors and name not in claims}
    for alias, name in ties.items():
        if alias in tensors:  # Reading compares them.
            tensors[name] = Copies(
                name, [tensors[name], tensors.pop(alias)], "under each name", _NOT_ONE
            )
    notes = [note for file in files.values() for note in file.notes]
    settings = [file for file in settings_of(path) if file.is_file()] if path.is_dir() else []
    is_alone = sum(is_table(options.rules, name) for name in {*tensors, *ties}) == 1
    if is_alone and path / CONFIG in settings and ties_words(read_json(path / CONFIG)):
        notes.append(
            f"`{CONFIG}` ties word embeddings. Other names of the table, such as `lm_head.weight`, "
            "are not in the checkpoint: a model must tie them itself."
        )
    return Checkpoint(
        format=NAME,
        path=path,
        tensors={Key(name): array for name, array in tensors.items()},
        ties=ties,
        notes=tuple(notes),
        files=tuple(dict.fromkeys([found, *files, *settings])),
    )


def _find(path: Path) -> Path:
    """Returns the file with the weights, or the index of several."""
    if path.is_file():
        return path
    for name in (_SAFETENSORS, _TORCH):
        for found in (path / f"{name}.index.json", path / name):
            if found.is_file():
                return found
    raise CheckpointError(
        f"`{path}` must have `{_SAFETENSORS}` or `{_SAFETENSORS}.index.json`, but has neither. "
        "Copy the whole directory."
    )


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    """Maps tensors to files, as the index at ``path`` says."""
    names = index.get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise CheckpointError(
            f"`{path}` must have a `weight_map` from names of tensors to names of files, but has "
            f"{shown(names)}."
        )
    single = path.with_name(path.name.removesuffix(".index.json"))
    if single.name not in names.values() and single.is_file():
        raise CheckpointError(
            f"`{path.parent}` must hold one checkpoint, but holds `{single.name}`, and "
            f"`{path.name}`, which names other files. Remove the one that is out of date."
        )
    files = {name: inside(path.parent, name, path) for name in dict.fromkeys(names.values())}
    return {name: files[file] for name, file in names.items()}


def _check_weight_map(
    path: Path, weight_map: Mapping[str, Path], files: Mapping[Path, _File]
) -> None:
    """Checks that each tensor is in the file that the index at ``path`` says, and no other."""
    for file, content in files.items():
        for name in sorted(content.names):
            if name not in weight_map:
                raise CheckpointError(
                    f"`{path}` must name all tensors, but lacks `{name}`, which is in "
                    f"`{file.name}`. The files are from different checkpoints: copy the whole "
                    "directory again."
                )
            if weight_map[name] != file:
                raise CheckpointError(
                    f"`{name}` must be in `{weight_map[name].name}` only, as `{path}` says, but is "
                    f"in `{file.name}`. The files are from different checkpoints: copy the whole "
                    "directory again."
                )
    for name, file in weight_map.items():
        if name not in files[file].names:
            raise CheckpointError(
                f"`{name}` must be in `{file.name}`, as `{path}` says, but is not. The files are "
                "from different checkpoints: copy the whole directory again."
            )


def _check_total_size(path: Path, index: Mapping[str, Any], files: Mapping[Path, _File]) -> None:
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    arrays = [array for file in files.values() for array in file.tensors.values()]
    if stated is None or any(array.dtype == torch.bool for array in arrays):
        return  # Older versions of transformers count a bool as an eighth of a byte.
    once = sum(array.nbytes for array in arrays)
    each = sum(
        file.tensors[file.ties.get(name, name)].nbytes
        for file in files.values()
        for name in file.names
    )
    if stated not in (once, each):
        raise CheckpointError(
            f"`total_size` in `{path}` must be the size of all tensors, {once}, but is "
            f"{shown(stated)}. If all files are from one checkpoint, remove `total_size` there."
        )


def _read_file(path: Path, options: ReadOptions) -> _File:
    if path.suffix == ".safetensors":
        arrays, metadata = safetensors_file.read(path)
        ties = {alias: name for alias, name in metadata.items() if name in arrays}
        ties.pop("format", None)  # Names the framework.
        return _File(arrays, set(arrays), ties, [])
    file = TorchFile(path, allow_unsafe=options.allow_unsafe_pickle)
    if not isinstance(file.root, Mapping) or not all(isinstance(name, str) for name in file.root):
        raise CheckpointError(
            f"`{path}` must hold a state dict, but holds a {type(file.root).__name__}."
        )
    tensors, ties = state_dict_arrays(file, file.root)
    by_name = {key.name: array for key, array in tensors.items()}
    names = {*by_name, *ties}
    notes = [
        f"`{name}` is no tensor and was left out: {shown(value)}"
        for name, value in file.root.items()
        if name not in names
    ]
    return _File(by_name, names, ties, notes)


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out safetensors files of at most ``max_shard_size`` bytes, and their index."""
    if target.max_shard_size < 1:
        raise CheckpointError(
            f"`--max-shard-size` must be at least 1 byte, but is {target.max_shard_size}."
        )
    copy_settings(checkpoint, target, path)
    is_tying = (path / CONFIG).is_file() and ties_words(read_json(path / CONFIG))
    # All names that each tensor is written under.
    names = {key.name: [key.name] for key in checkpoint.tensors}
    for alias, name in checkpoint.ties.items():
        if not (is_tying and name in target.tables and is_table((), alias)):
            names[name].append(alias)
    described = {
        written: (array.shape, array.dtype)
        for key, array in checkpoint.tensors.items()
        for written in names[key.name]
    }

    shards = _split(described, target.max_shard_size)
    weight_map: dict[str, str] = {}
    arrays: dict[str, Array] = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = _SAFETENSORS.replace(".", f"{suffix}.")
        ties = {alias: name for alias, name in checkpoint.ties.items() if name in shard}
        aligned = dict(sorted(shard.items(), key=lambda item: -item[1][1].itemsize))
        arrays |= safetensors_file.lay_out(path / file, aligned, {**ties, "format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total_size = sum(array.nbytes for array in arrays.values())
        write_json(
            path / f"{_SAFETENSORS}.index.json",
            {"metadata": {"total_size": total_size}, "weight_map": weight_map},
        )
    return Output(
        {
            key: Copies(key.name, [arrays[written] for written in names[key.name]])
            for key in checkpoint.tensors
        }
    )


_Described = dict[str, tuple[Index, torch.dtype]]


def _split(tensors: _Described, max_size: int) -> list[_Described]:
    """Assigns tensors to files as ``huggingface_hub.split_torch_state_dict_into_shards()`` does: in
    order, as many as fit. Tensors larger than ``max_size`` get a file of their own."""
    shards: list[_Described] = []
    current: _Described = {}
    free = max_size
    for name, (shape, dtype) in tensors.items():
        size = prod(shape) * dtype.itemsize
        if size > max_size:
            shards.append({name: (shape, dtype)})
            continue
        if size > free:
            shards.append(current)
            current, free = {}, max_size
        current[name] = shape, dtype
        free -= size
    return [*shards, current] if current else shards
