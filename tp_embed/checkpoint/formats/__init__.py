"""The formats that checkpoints are read from and written to, each a module of this package."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from ..choices import FORMATS as FORMATS
from ..contents import MASTER, MOMENTS, WEIGHT, Checkpoint, Key, Output, ReadOptions, Target
from ..errors import CheckpointError


class Format(Protocol):
    """What the module of a format has."""

    NAME: str
    # Whether a checkpoint is one file, and not a directory.
    IS_FILE: bool
    # Whether there are files for each tensor-parallel rank.
    HAS_RANKS: bool
    # Whether it holds the state of an optimizer.
    HAS_OPTIMIZER: bool
    # Whether it holds what else there is of a training run, as the state of a schedule.
    HAS_EXTRA: bool
    # The state by which it holds Parameters: `WEIGHT`, or `MASTER` if it has them in fp32 only.
    MAIN: str

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` looks like a checkpoint of this format. Reads no more than names."""
        ...

    def read(self, path: Path, options: ReadOptions) -> Checkpoint:
        """What is in ``path``. All metadata is checked; of the tensors it says where they are.

        :raises CheckpointError: it is damaged, incomplete, or of something else.
        """
        ...

    def lay_out(self, checkpoint: Checkpoint, target: Target, path: Path) -> Output:
        """Writes all files of ``path``, a new name in a directory that is there, with space for the
        tensors of ``checkpoint``. A file that is there already has been laid out before, by a run
        that was killed, and is kept.

        :raises CheckpointError: it cannot be written in this format.
        """
        ...


def get(name: str) -> Format:
    """The format of a name.

    :raises CheckpointError: there is none.
    """
    if name not in FORMATS:
        raise CheckpointError(f"The format must be one of {list(FORMATS)}, but is `{name}`.")
    return cast(Format, import_module(f".{FORMATS[name]}", __name__))


def read(path: Path, options: ReadOptions, name: str | None = None) -> Checkpoint:
    """What is in ``path``, in the format ``name``, or in the one that it is recognised by.

    :raises CheckpointError: it is not there, in no known format, damaged, or incomplete.
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
    except Exception as e:  # What is damaged can have anything in any place.
        raise CheckpointError(
            f"`{path}` must be a checkpoint in the format {found.NAME}, but cannot be read as one: "
            f"{type(e).__name__}: {e}. It is damaged, or of a version that is not known here."
        ) from e
    checkpoint = _without_odd_states(checkpoint)
    _check(checkpoint)
    return checkpoint


def _without_odd_states(checkpoint: Checkpoint) -> Checkpoint:
    """Leaves out what an optimizer has that is not of the shape of its Parameter, as factors of
    moments: nobody could say how to cut it."""
    known = (WEIGHT, MASTER, *MOMENTS)
    shapes = {
        key.name: array.shape
        for key, array in checkpoint.tensors.items()
        if key.state in (WEIGHT, MASTER)
    }
    odd = [
        key
        for key, array in checkpoint.tensors.items()
        if key.state not in known and shapes.get(key.name, array.shape) != array.shape
    ]
    if not odd:
        return checkpoint
    tensors = {key: array for key, array in checkpoint.tensors.items() if key not in set(odd)}
    note = (
        f"{len(odd)} states of the optimizer, as {odd[0]}, were left out: their shapes are not "
        "those of their Parameters"
    )
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _check(checkpoint: Checkpoint) -> None:
    """What holds in every format."""
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
                f"What the optimizer in `{path}` has must be of Parameters of the model, but it "
                f"has `{key}`."
            )
        if array.shape != main.shape:
            raise CheckpointError(
                f"`{key}` in `{path}` must have the shape of its Parameter, {main.shape}, but has "
                f"{array.shape}."
            )
    for alias, name in checkpoint.ties.items():
        if Key(name) not in tensors and Key(name, MASTER) not in tensors:
            raise CheckpointError(
                f"`{alias}` in `{path}` must be another name of a Parameter, but is one of "
                f"`{name}`, which is not there."
            )


def _recognise(path: Path) -> Format:
    for name in FORMATS:
        if (found := get(name)).recognises(path):
            return found
    raise CheckpointError(
        f"`{path}` must be a checkpoint in one of the formats {list(FORMATS)}, but is not "
        "recognised as any. Say which with `--from`, or give the file or directory itself."
    )
