"""Reads the checkpoint of a tag. Joins the shards of all ranks to whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...contents import MASTER, Checkpoint, Key, Optimizer, ReadOptions
from ...errors import CheckpointError, shown
from ...files.arrays import Array, Span, View, same_bits
from ...files.derived import Cast
from ..apart import with_tables
from . import zero0
from .files import (
    STRUCTURE,
    ModelFile,
    Saved,
    array_of,
    find_tag,
    open_tag,
)
from .fragments import Optimizers, frozen_shard, read_optimizers
from .layout import Layout

# Larger buffers are not compared between ranks: statistics are, tables aren't.
_SMALL = 100_000


@dataclass(frozen=True)
class _Names:
    """The names of a model.

    :param own: one name for each Parameter and buffer, in the order of the model.
    :param ties: maps other names to names in ``own``.
    :param unknown: names without values in the checkpoint.
    """

    own: list[str]
    ties: dict[str, str]
    unknown: list[str]


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Joins the model and optimizer files of all ranks of one tag."""
    saved = open_tag(find_tag(path, options.tag), options)
    model = saved.models[0][0]
    names = _names(model)
    buffers = frozenset(name for name in names.own if name in model.buffers)
    optimizers, notes = _optimizers(saved, names, options)
    layout = Layout(
        model.state.get("universal_checkpoint_info"), saved.tp_size, options, model.file.path
    )
    shards = _shards(saved, names, optimizers)
    tensors = {
        key: layout.join(key.name, str(key), own, key.name in buffers)
        for key, own in shards.items()
    }
    for key in [key for key in tensors if key.state == MASTER]:
        weight, empty = tensors.get(Key(key.name)), model.module.get(key.name)
        if weight is not None and weight.dtype == tensors[key].dtype:
            del tensors[key]  # A copy of the weight.
        elif weight is None and empty is not None and empty.dtype != tensors[key].dtype:
            # ZeRO 3 stores no 16-bit values: an engine casts when it loads.
            tensors[Key(key.name)] = Cast(key.name, tensors[key], empty.dtype)
    others = {key: value for key, value in model.state.items() if key not in STRUCTURE}
    extra, odd = model.file.plain_entries(others)
    notes += odd
    notes += _differing_buffers(saved)
    if names.unknown:
        notes.append(f"{names.unknown} were left out: the checkpoint has no values for them")
    step = model.state.get("global_steps")
    held = Checkpoint(
        format="deepspeed",
        path=path,
        tensors=tensors,
        tp_size=saved.tp_size,
        cuts=layout.cuts,
        ties=names.ties,
        buffers=buffers,
        step=step if isinstance(step, int) else None,
        optimizer=_optimizer(optimizers, model.file.path),
        extra={**extra, **(optimizers[0].scalars if optimizers else {})},
        notes=tuple(notes),
        files=saved.paths,
    )
    return with_tables(held, saved.directory, options)


def _names(model: ModelFile) -> _Names:
    known = {**model.trained, **model.frozen_shapes}
    ties = {
        alias: first
        for names in model.same
        for first in [_main_name(names, known)]
        for alias in names
        if alias != first
    }
    for alias, first in model.shared.items():
        if (
            alias in model.module
            and alias not in known
            and (first in known or first in model.module)
        ):
            ties[alias] = ties.get(first, first)
    said = {*ties, *known, *model.buffers}
    unknown = [
        name
        for name, tensor in model.module.items()
        if model.is_zero3 and not tensor.numel() and name not in said
    ]
    others = {*ties, *unknown}
    own = [name for name in (*model.module, *known) if name not in others]
    if any(alias == first or first in others for alias, first in ties.items()):
        raise CheckpointError(
            f"`shared_params` in `{model.file.path}` must map names to stored Parameters, but is "
            f"{shown(model.shared)}. The file is damaged: copy it again."
        )
    return _Names(list(dict.fromkeys(own)), ties, unknown)


def _main_name(names: Sequence[str], known: Mapping[str, Any]) -> str:
    """Picks the main name of a Parameter: the one in the optimizer, if any."""
    return next((name for name in names if name in known), names[0])


def _optimizers(
    saved: Saved, names: _Names, options: ReadOptions
) -> tuple[list[Optimizers], list[str]]:
    """Reads the optimizers of each tensor-parallel rank; may be none. Returns them and notes."""
    first = saved.models[0][0]
    found: list[Optimizers] = []
    if saved.optimizers:
        if first.shapes is None:
            raise CheckpointError(
                f"`{first.file.path}` must have `param_shapes`, as a ZeRO optimizer saves them, "
                "but has none. Copy all files of one checkpoint."
            )
        found = [
            read_optimizers(row[0], files)
            for row, files in zip(saved.models, saved.optimizers, strict=True)
        ]
    elif first.is_zero3:
        raise CheckpointError(
            f"`{saved.directory}` must have files `*_optim_states.pt`, which hold the weights at "
            "ZeRO 3, but has none. Copy all files of the checkpoint."
        )
    elif first.shapes is None:
        parameters = [name for name in names.own if name not in first.buffers]
        own = [zero0.read_optimizer(row[0], parameters, options) for row in saved.models]
        found = [each for each in own if each is not None]
        if len(found) not in (0, saved.tp_size):
            raise CheckpointError(
                f"All model files of `{saved.directory}` must hold an optimizer, or none, but "
                f"{len(found)} of {saved.tp_size} do. Copy all files of one checkpoint."
            )
    notes = list(found[0].notes) if found else ["The checkpoint has no optimizer state"]
    if found and found[0].groups and not any(key.state != MASTER for key in found[0].shards):
        notes.append("The optimizer has made no step, so it has no moments")
    return found, notes


def _shards(
    saved: Saved, names: _Names, optimizers: Sequence[Optimizers]
) -> dict[Key, list[Array]]:
    """Returns the shards of each tensor-parallel rank."""
    states = list(dict.fromkeys(key.state for own in optimizers for key in own.shards))
    found = {}
    for name in names.own:
        weights = [_weight(row, name) for row in saved.models]
        if any(weight is not None for weight in weights):
            found[Key(name)] = _complete(saved, Key(name), weights)
        for key in (Key(name, state) for state in states):
            shards = [own.shards.get(key) for own in optimizers]
            if any(shard is not None for shard in shards):
                found[key] = _complete(saved, key, shards)
    return found


def _differing_buffers(saved: Saved) -> list[str]:
    """Notes buffers that differ between data-parallel ranks."""
    return [
        f"`{name}` differs between data-parallel ranks: rank 0's was taken"
        for row in saved.models
        for name in sorted(row[0].buffers & row[0].module.keys())
        if row[0].module[name].numel() <= _SMALL
        and any(not _is_same(row[0], other, name) for other in row[1:])
    ]


def _is_same(first: ModelFile, other: ModelFile, name: str) -> bool:
    one, two = (array_of(m.file, m.module.get(name), f"`{name}`").load() for m in (first, other))
    return (one.dtype, one.shape) == (two.dtype, two.shape) and same_bits(one, two)


def _weight(row: Sequence[ModelFile], name: str) -> Array | None:
    """Returns the shard of a tensor-parallel rank, if its model files have it."""
    model = row[0]
    if model.is_zero3 and name in model.frozen_shapes:
        return frozen_shard(row, name)
    if name not in model.module or (model.is_zero3 and name in model.trained):
        return None
    return array_of(model.file, model.module[name], f"`{name}`")


def _complete(saved: Saved, key: Key, shards: Sequence[Array | None]) -> list[Array]:
    """Fills in empty shards for ranks without elements of a Parameter."""
    dtype = next(shard.dtype for shard in shards if shard is not None)
    return [
        _empty(row[0], key, dtype) if shard is None else shard
        for row, shard in zip(saved.models, shards, strict=True)
    ]


def _empty(model: ModelFile, key: Key, dtype: torch.dtype) -> Array:
    shape = model.shape(key.name)
    if prod(shape):
        raise CheckpointError(
            f"`{model.file.path}` or the files of its optimizer must have {key}, of shape {shape}, "
            "as other ranks do, but do not. Copy all files of one checkpoint."
        )
    return View(Span(model.file.path, 0, 0, dtype), shape)


def _optimizer(optimizers: Sequence[Optimizers], path: Path) -> Optimizer | None:
    """Merges the optimizers of all ranks. Checks that they match."""
    if not optimizers or not optimizers[0].groups:
        return None
    steps: dict[str, float] = {}
    for own in optimizers:
        for name, step in own.steps.items():
            if steps.setdefault(name, step) != step:
                raise CheckpointError(
                    f"All tensor-parallel ranks next to `{path}` must have made the same number of "
                    f"steps, but for `{name}` they have made {steps[name]:g} and {step:g}. Copy "
                    "all files of one checkpoint."
                )
    if len({len(own.groups) for own in optimizers}) != 1:
        raise CheckpointError(
            f"All tensor-parallel ranks next to `{path}` must have the same number of param "
            f"groups, but have {[len(own.groups) for own in optimizers]}."
        )
    groups = []
    for index, (group, _) in enumerate(optimizers[0].groups):
        names = dict.fromkeys(name for own in optimizers for name in own.groups[index][1])
        groups.append({**group, "params": list(names)})
    return Optimizer(tuple(groups), steps)
