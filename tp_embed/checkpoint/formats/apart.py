"""Reads and writes the tables of an engine that have an optimizer of their own.

They are in a directory of DCP next to the files of DeepSpeed, in the directory of a tag: DeepSpeed
neither trains nor saves them. See :mod:`tp_embed.checkpoint.table_files`, by which engines write
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..contents import ROW_OPTIMIZER, Arrays, Checkpoint, Optimizer, Output, ReadOptions, Target
from ..errors import CheckpointError
from . import dcp

DIRECTORY = "tp_embed_own_tables"
# Snapshots of tables in memory-mapped files, whose weights in the files of DeepSpeed are empty.
MAPPED_DIRECTORY = "tp_embed_mapped_tables"
# Names the save in the file `NOTE` of a tag, written after the tables, and in the client state.
# Converted checkpoints have neither.
STAMP = "tp_embed_save"
NOTE = "tp_embed_tables.json"


def read_note(tag: Path) -> dict[str, Any]:
    """Returns what an engine has noted of the tables in a tag; empty if there is nothing."""
    file = tag / NOTE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as e:
        found = e
    if not isinstance(found, dict):
        raise CheckpointError(f"`{file}` must hold a dict as JSON, but does not. Copy it again.")
    return found


def write_note(tag: Path, content: Mapping[str, Any] | None) -> None:
    """Writes what :func:`read_note` reads, atomically; ``None`` deletes it."""
    if content is None:
        (tag / NOTE).unlink(missing_ok=True)
        return
    new = tag / f"{NOTE}.tmp"
    new.write_text(json.dumps(content))
    new.replace(tag / NOTE)


def check_stamp(tag: Path, tables: Any, model: Any) -> None:
    """Checks that the stamps of the tables and of the model in a tag are the same.

    :raises CheckpointError: they are not.
    """
    if tables != model:
        raise CheckpointError(
            f"`{tag}` must hold the model and the tables of one save, but they are of two: the "
            "second was interrupted, or files of others were copied. Load another tag; save each "
            "step under a tag of its own."
        )


def with_tables(rest: Checkpoint, tag: Path, options: ReadOptions) -> Checkpoint:
    """Returns ``rest``, what the files of DeepSpeed hold, with the tables of the tag, if any.

    :raises CheckpointError: a table is in both, tables are in memory-mapped files, or the tables
        and the rest are of two saves.
    """
    check_stamp(tag, read_note(tag).get(STAMP), rest.extra.get(STAMP))
    rest = replace(rest, extra={k: value for k, value in rest.extra.items() if k != STAMP})
    if (tag / MAPPED_DIRECTORY).is_dir():
        raise CheckpointError(
            f"`{tag}` must hold all tables to be converted, but holds snapshots of tables in "
            f"memory-mapped files, `{tag / MAPPED_DIRECTORY}`, which only the engine reads. Load "
            "it there."
        )
    if not (tag / DIRECTORY).is_dir():
        return rest
    found = ReadOptions(allow_unsafe_pickle=options.allow_unsafe_pickle)
    tables = dcp.read(tag / DIRECTORY, found)
    if both := {*rest.names, *rest.ties} & {*tables.names, *tables.ties}:
        raise CheckpointError(
            f"`{sorted(both)[0]}` must be either in the files of DeepSpeed or in "
            f"`{tag / DIRECTORY}`, but is in both. Copy all files of one checkpoint."
        )
    optimizer = tables.optimizer
    if rest.optimizer is not None and optimizer is not None:
        optimizer = Optimizer(
            (*rest.optimizer.groups, *optimizer.groups), {**rest.optimizer.steps, **optimizer.steps}
        )
    return replace(
        rest,
        tensors={**rest.tensors, **tables.tensors},
        ties={**rest.ties, **tables.ties},
        optimizer=optimizer or rest.optimizer,
        notes=(*rest.notes, *tables.notes),
        files=(*rest.files, *tables.files),
    )


def lay_out_apart(
    checkpoint: Checkpoint,
    target: Target,
    lay_out_rest: Callable[[Checkpoint], tuple[Path, Arrays]],
) -> Output:
    """Lays out the tables with an optimizer of their own in the directory of a tag.

    :param lay_out_rest: lays out everything else, and returns the directory and the arrays.
    """
    apart, optimizer = checkpoint.apart, checkpoint.optimizer
    if not apart or optimizer is None:
        return Output(dict(lay_out_rest(checkpoint)[1]))
    parts, tensors = [], checkpoint.tensors
    for is_apart in (False, True):
        groups = tuple(g for g in optimizer.groups if (ROW_OPTIMIZER in g) == is_apart)
        steps = {n: step for n, step in optimizer.steps.items() if (n in apart) == is_apart}
        parts.append(
            replace(
                checkpoint,
                tensors={k: a for k, a in tensors.items() if (k.name in apart) == is_apart},
                ties={k: n for k, n in checkpoint.ties.items() if (n in apart) == is_apart},
                buffers=frozenset() if is_apart else checkpoint.buffers,
                step=None if is_apart else checkpoint.step,
                optimizer=Optimizer(groups, steps) if groups else None,
            )
        )
    tag, arrays = lay_out_rest(parts[0])
    (tag / DIRECTORY).mkdir(exist_ok=True)
    return Output({**arrays, **dcp.lay_out(parts[1], target, tag / DIRECTORY).arrays})
