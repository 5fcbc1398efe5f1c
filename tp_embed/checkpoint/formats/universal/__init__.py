"""Reads and writes universal checkpoints, which DeepSpeed engines load at any ZeRO stage and number
of ranks.

Source: ``deepspeed.checkpoint.ds_to_universal`` and ``DeepSpeedEngine._load_checkpoint``.
``paths.py`` describes the files.

DeepSpeed's converter writes a variant. At ZeRO 1 and 2, it adds directories for buffers, tied names
and frozen Parameters, whose proper values are in the model files. At ZeRO 3 without tensor
parallelism, tensors are flat and their shapes are in the model files.

Without optimizer state in the source we write no ``zero/optimizer_state.pt``, and DeepSpeed refuses
to load the result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ...contents import MASTER, MOMENTS, Checkpoint, Key, Optimizer, ReadOptions
from ...errors import CheckpointError
from ...files.arrays import Array
from ...files.derived import Copies
from ...files.torch_file import TorchFile
from ..apart import with_tables
from ..deepspeed.files import ModelFile, Saved, array_of, expect
from ..deepspeed.fragments import frozen_shard
from ..deepspeed.layout import Layout
from .cuts import cuts_of_whole
from .files import locate, open_file, open_ranks, read_entry
from .layout import lay_out
from .paths import (
    LATEST,
    STEP,
    files_of_parameters,
    is_universal,
    optimizer_state_file,
    parameter_directory,
    parameters_of,
    state_file,
)
from .run import read_extra, read_groups, read_step

__all__ = ["lay_out", "read", "recognises"]

NAME = "universal"
IS_FILE = False
HAS_RANKS = True
HAS_OPTIMIZER = True
HAS_EXTRA = True
MAIN = MASTER

_INFO = "universal_checkpoint_info"


def recognises(path: Path) -> bool:
    """Returns whether ``path`` is or contains a universal checkpoint of DeepSpeed."""
    return is_universal(path) or (path / LATEST).is_file()


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Reads the tensors of a universal checkpoint, and the metadata in its model files."""
    directory = locate(path, options)
    kinds = open_ranks(directory, options)
    saved = kinds[0]
    model = saved.models[0][0]
    entries = _entries(directory, model)
    trained = _with_moments(entries)
    ties = _ties(model, trained)
    saved_optimizer = open_file(optimizer_state_file(directory), options) if trained else None

    tensors: dict[Key, Array] = {}
    files: dict[str, TorchFile] = {}
    steps = {}
    flat_shapes = model.trained if saved.tp_size == 1 else {}
    for name, entry in entries.items():
        # DeepSpeed's converter writes directories for these too: one rank's values, in fp32.
        if name in ties or name in model.buffers or (name in model.module and name not in trained):
            continue
        for state in (MASTER, *MOMENTS) if name in trained else (MASTER,):
            file = open_file(state_file(entry, state), options)
            tensors[Key(name, state)] = read_entry(file, flat_shapes.get(name))
            files.setdefault(name, file)
        if saved_optimizer is not None and name in trained:
            steps[name] = read_step(state_file(entry, STEP), saved_optimizer, options)

    info = _info(model, saved_optimizer)
    layout = Layout(info, saved.tp_size, options, model.file.path)
    shapes = {key.name: array.shape for key, array in tensors.items()}
    cuts = cuts_of_whole(shapes, layout, files)
    rest = {
        Key(name): layout.join(name, name, shards, name in model.buffers)
        for name, shards in _shards(kinds, tensors, ties).items()
    }
    tensors = _in_order([*model.module, *model.trained], {**tensors, **rest})
    names = list(dict.fromkeys(key.name for key in tensors))
    extra, notes = read_extra(model, saved_optimizer)
    optimizer = None
    if saved_optimizer is not None:
        groups, more = read_groups(saved_optimizer, model, names, trained)
        optimizer, notes = Optimizer(groups, steps), [*notes, *more]
        tensors = _in_order(chain(*(group["params"] for group in groups)), tensors)
    held = Checkpoint(
        format=NAME,
        path=path,
        tensors=tensors,
        tp_size=saved.tp_size,
        cuts={**cuts, **layout.cuts},
        ties=ties,
        buffers=frozenset(name for name in model.buffers if name not in ties),
        step=model.state.get("global_steps"),
        optimizer=optimizer,
        extra=extra,
        notes=(*notes, *_notes_on_steps(steps.values())),
        files=(
            *(path for saved in kinds for path in saved.paths),
            *files_of_parameters(directory),
        ),
    )
    return with_tables(held, directory, options)


def _entries(directory: Path, model: ModelFile) -> dict[str, Path]:
    """The directories of Parameters, by name."""
    entries = parameters_of(directory)
    if lost := [name for name in model.trained if name not in entries]:
        raise CheckpointError(
            f"There must be a directory `{parameter_directory(directory, lost[0])}`, since the "
            "model files have its Parameter, but there is none. Copy the whole checkpoint."
        )
    return entries


def _with_moments(entries: Mapping[str, Path]) -> set[str]:
    """The names of Parameters that were trained."""
    return {
        name
        for name, entry in entries.items()
        if any(state_file(entry, state).exists() for state in MOMENTS)
    }


def _notes_on_steps(steps: Collection[float]) -> list[str]:
    if len(set(steps)) <= 1:
        return []
    return [
        f"Parameters have made from {min(steps):.0f} to {max(steps):.0f} steps. An engine can "
        "continue from this at ZeRO 0 only."
    ]


def _ties(model: ModelFile, trained: Collection[str]) -> dict[str, str]:
    """Maps other names of Parameters to their own: names that DeepSpeed records, and all names of
    one tensor except the trained one."""
    ties = dict(model.shared)
    if circular := [alias for alias, name in ties.items() if name in ties]:
        raise CheckpointError(
            f"`shared_params` in `{model.file.path}` must name Parameters that are stored, but "
            f"`{circular[0]}` is `{ties[circular[0]]}`, which is not. The file is "
            "damaged: copy it again."
        )
    for names in model.same:
        own = [name for name in names if name not in model.buffers and name not in ties]
        own.sort(key=lambda name: name not in trained)  # Stable: trained names first.
        ties |= {name: own[0] for name in own[1:] if name not in trained}
    return ties


def _shards(
    kinds: Sequence[Saved], tensors: Collection[Key], ties: Collection[str]
) -> dict[str, list[Array]]:
    """Returns each rank's shards of buffers, and of untrained Parameters, which DeepSpeed's
    converter does not merge."""
    saved = kinds[0]
    model = saved.models[0][0]
    done = {*(key.name for key in tensors), *ties}
    wanted = [name for name in [*model.module, *model.frozen_shapes] if name not in done]
    shards: dict[str, list[Array]] = {}
    for name in dict.fromkeys([*wanted, *model.buffers]):
        frozen = model.frozen_shapes.get(name)
        # At ZeRO 3, the model's Parameters are empty tensors.
        if frozen is not None and (
            name not in model.module or tuple(model.module[name].shape) != frozen
        ):
            shards[name] = [frozen_shard(row, name) for row in saved.models]
        elif name not in ties:
            shards[name] = [
                Copies(name, [_in_module(each.models[rank][0], name) for each in kinds])
                for rank in range(saved.tp_size)
            ]
    return shards


def _in_module(model: ModelFile, name: str) -> Array:
    what = f"`{name}` in `module`"
    return array_of(model.file, model.module.get(name), what)


def _info(model: ModelFile, saved_optimizer: TorchFile | None) -> dict[str, Any]:
    """Returns what the checkpoint records about the cuts of its Parameters."""
    for file in (model.file, *([] if saved_optimizer is None else [saved_optimizer])):
        info = expect(file.root, dict, "The content", file.path).get(_INFO)
        if info is not None:
            return expect(info, dict, f"`{_INFO}`", file.path)
    return {}


def _in_order(names: Iterable[str], tensors: Mapping[Key, Array]) -> dict[Key, Array]:
    """Sorts ``tensors`` in the order of ``names``; others come last."""
    place = {name: index for index, name in enumerate(dict.fromkeys(names))}
    ordered = sorted(tensors, key=lambda key: place.get(key.name, len(place)))
    return {key: tensors[key] for key in ordered}
