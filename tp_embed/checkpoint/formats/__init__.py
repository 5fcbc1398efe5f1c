"""Checkpoint formats, one module each, that can be read and written."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from ..choices import FORMATS as FORMATS
from ..contents import (
    MASTER,
    MOMENTS,
    WEIGHT,
    Checkpoint,
    Key,
    Output,
    ReadOptions,
    Target,
    fits,
)
from ..errors import CheckpointError


class Format(Protocol):
    """The interface of a format's module."""

    NAME: str
    # A checkpoint is one file, not a directory.
    IS_FILE: bool
    # Has files for each tensor-parallel rank.
    HAS_RANKS: bool
    # Holds optimizer state.
    HAS_OPTIMIZER: bool
    # Holds other state of a training run, such as a learning-rate schedule.
    HAS_EXTRA: bool
    # The main state of a Parameter: `WEIGHT`, or `MASTER` if the format stores only fp32.
    MAIN: str

    def recognises(self, path: Path) -> bool:
        """Returns whether ``path`` looks like a checkpoint of this format, by file names only."""
        ...

    def read(self, path: Path, options: ReadOptions) -> Checkpoint:
        """Reads the checkpoint at ``path``. Checks all metadata; tensors stay in their files.

        :raises CheckpointError: ``path`` is damaged, incomplete, or in another format.
        """
        ...

    def lay_out(self, checkpoint: Checkpoint, target: Target, path: Path) -> Output:
        """Creates all files at ``path``, with space for the tensors of ``checkpoint``. The parent
        directory must exist. Keeps existing files: a killed run has laid them out.

        :raises CheckpointError: this format cannot hold ``checkpoint``.
        """
        ...


def get(name: str) -> Format:
    """Returns the format called ``name``.

    :raises CheckpointError: no format has this name.
    """
    if name not in FORMATS:
        raise CheckpointError(f"The format must be one of {list(FORMATS)}, but is `{name}`.")
    return cast(Format, import_module(f".{FORMATS[name]}", __name__))


def read(path: Path, options: ReadOptions, name: str | None = None) -> Checkpoint:
    """Reads the checkpoint at ``path``, in the format ``name`` or else the detected one.

    :raises CheckpointError: ``path`` does not exist, is in no known format, damaged, or incomplete.
    """
    if not path.exists():
        raise CheckpointError(f"There must be a checkpoint at `{path}`, but there is nothing.")
    found = get(name) if name else _recognise(path)
    try:
        checkpoint = replace(found.read(path, options), path=path)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"`{path}` cannot be read: {e}.") from e
    except Exception as e:  # A damaged checkpoint can raise anything.
        raise CheckpointError(
            f"`{path}` must be a checkpoint in the format {found.NAME}, but cannot be read as one: "
            f"{type(e).__name__}: {e}. It is damaged, or of an unknown version."
        ) from e
    checkpoint = _drop_odd_states(checkpoint)
    _check(checkpoint)
    return checkpoint


def _drop_odd_states(checkpoint: Checkpoint) -> Checkpoint:
    """Drops optimizer states whose shape differs from their Parameter's, such as factored moments:
    how to cut them is unknown."""
    known = (WEIGHT, MASTER, *MOMENTS)
    shapes = {
        key.name: array.shape
        for key, array in checkpoint.tensors.items()
        if key.state in (WEIGHT, MASTER)
    }
    odd = [
        key
        for key, array in checkpoint.tensors.items()
        if key.state not in known and not fits(key, array.shape, shapes.get(key.name, array.shape))
    ]
    if not odd:
        return checkpoint
    tensors = {key: array for key, array in checkpoint.tensors.items() if key not in set(odd)}
    note = (
        f"{len(odd)} states of the optimizer, such as {odd[0]}, were left out: their shapes differ "
        "from their Parameters'"
    )
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _check(checkpoint: Checkpoint) -> None:
    """Checks what must hold in every format."""
    path, tensors = checkpoint.path, checkpoint.tensors
    if not tensors:
        raise CheckpointError(f"`{path}` must hold tensors, but holds none.")
    step = checkpoint.step
    if step is not None and (type(step) is not int or not 0 <= step < 10**18):
        raise CheckpointError(f"The step in `{path}` must be a number from 0 on, but is {step!r}.")
    for key, array in tensors.items():
        if not isinstance(key.name, str) or not isinstance(key.state, str):
            raise CheckpointError(f"A name in `{path}` must be a string, but is {key!r}.")
        main = tensors.get(Key(key.name), tensors.get(Key(key.name, MASTER)))
        if main is None:
            raise CheckpointError(
                f"The optimizer states in `{path}` must belong to Parameters of the model, but "
                f"`{key}` does not."
            )
        if not fits(key, array.shape, main.shape):
            raise CheckpointError(
                f"`{key}` in `{path}` must have the shape of its Parameter, {main.shape}, but has "
                f"{array.shape}."
            )
    for alias, name in checkpoint.ties.items():
        if Key(name) not in tensors and Key(name, MASTER) not in tensors:
            raise CheckpointError(
                f"`{alias}` in `{path}` must be another name of a Parameter, but is tied to "
                f"`{name}`, which is missing."
            )


def _recognise(path: Path) -> Format:
    for name in FORMATS:
        if (found := get(name)).recognises(path):
            return found
    raise CheckpointError(
        f"`{path}` must be a checkpoint in one of the formats {list(FORMATS)}, but is not "
        "recognised as any. Name one with `--from`, or pass the file or directory itself."
    )
