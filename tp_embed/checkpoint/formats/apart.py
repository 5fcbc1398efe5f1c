"""Reads and writes the tables of an engine that have an optimizer of their own.

They are in a directory of DCP next to the files of DeepSpeed, in the directory of a tag: DeepSpeed
neither trains nor saves them. See :mod:`tp_embed.checkpoint.table_files`, by which engines write
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..contents import ROW_OPTIMIZER, Arrays, Checkpoint, Optimizer, Output, ReadOptions, Target
from ..errors import CheckpointError
from . import dcp

DIRECTORY = "tp_embed_own_tables"
# Snapshots of tables in memory-mapped files, whose weights in the files of DeepSpeed are empty.
MAPPED_DIRECTORY = "tp_embed_mapped_tables"


def with_tables(rest: Checkpoint, tag: Path, options: ReadOptions) -> Checkpoint:
    """Returns ``rest``, what the files of DeepSpeed hold, with the tables of the tag, if any.

    :raises CheckpointError: a table is in both, or tables are in memory-mapped files.
    """
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
