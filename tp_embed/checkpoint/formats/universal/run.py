"""Reads the state of a training run from a universal checkpoint: param groups, step counts, and
what DeepSpeed and the client have saved with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ...contents import ReadOptions
from ...errors import CheckpointError
from ...files.arrays import Index
from ...files.torch_file import TorchFile
from ..deepspeed.files import STRUCTURE, ModelFile, expect, scalars
from .files import open_file


def read_groups(
    file: TorchFile, model: ModelFile, names: Collection[str], trained: Collection[str]
) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """Returns the param groups with the names of their Parameters, and notes."""
    state = expect(file.root, dict, "The content", file.path)
    groups = expect(state.get("param_groups"), list, "`param_groups`", file.path)
    if not groups:
        raise CheckpointError(f"`param_groups` in `{file.path}` must not be empty, but is.")
    members = [_members(group, model.shapes or [], file.path) for group in groups]
    notes = []
    if not any(members):
        # In the order of the model, or of the optimizer as far as known.
        members = [[name for name in names if name in trained], *([] for _ in groups[1:])]
        if len(groups) > 1:
            notes.append(
                f"The checkpoint does not assign Parameters to its {len(groups)} param groups: all "
                "are put into the first one."
            )
    counts = Counter(chain(*members))
    odd = [name for name in [*counts, *trained] if counts[name] != 1 or name not in names]
    if odd:
        raise CheckpointError(
            f"The param groups in `{file.path}` must have each trained Parameter once, but "
            f"`{odd[0]}` is missing, repeated or unknown. Copy all files of one checkpoint."
        )
    found = []
    for group, own in zip(groups, members, strict=True):
        kept, odd = file.hyperparameters(group)
        found.append({**kept, "params": own})
        notes += odd
    return tuple(found), notes


def _members(group: Any, shapes: Sequence[Mapping[str, Index]], path: Path) -> list[str]:
    """Returns the names of a group's Parameters. Its members are names, as we write them, or
    numbers of groups of ``shapes``, as DeepSpeed does."""
    found: list[str] = []
    group = expect(group, dict, "A param group", path)
    for member in expect(group.get("params"), list, "The Parameters of a param group", path):
        if isinstance(member, str):
            found.append(member)
        elif type(member) is int and 0 <= member < len(shapes):
            found += shapes[member]
    return found


def read_step(path: Path, state_file: TorchFile, options: ReadOptions) -> float:
    """Returns the step count of a Parameter. At ZeRO 3, DeepSpeed's converter writes a common one
    into the optimizer's file."""
    if path.exists():
        file = open_file(path, options)
        return file.number("The step", file.root)
    match state_file.root:
        case {"optimizer_state_dict": {"state": {0: {"step": step}}}}:
            return state_file.number("The step", step)
    raise CheckpointError(
        f"There must be a file `{path}`, since there are moments, but there is none. Copy the "
        "whole checkpoint."
    )


def read_extra(model: ModelFile, state_file: TorchFile | None) -> tuple[dict[str, Any], list[str]]:
    """Returns other state of the training run, and notes about dropped entries."""
    others = {key: value for key, value in model.state.items() if key not in STRUCTURE}
    extra, notes = model.file.plain_entries(others)
    if state_file is not None:
        state = expect(state_file.root, dict, "The content", state_file.path)
        kept, more = scalars(state_file, state)
        extra, notes = {**extra, **kept}, [*notes, *more]
    return extra, notes
