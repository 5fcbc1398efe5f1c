"""What goes wrong with a checkpoint."""

import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint cannot be read as what it should be, or cannot be written as what is asked for.
    Nothing has been written."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint could run code, or reach files outside of its directory, if it were read."""


class MismatchError(CheckpointError):
    """Two checkpoints that should be equal differ."""


def asks_to_import(path: Path, names: Iterable[str]) -> UnsafeCheckpointError:
    """The error for a pickle at ``path`` that asks for the classes or functions ``names``."""
    return UnsafeCheckpointError(
        f"`{path}` must hold tensors and plain values only, but asks to import {list(names)}, "
        "which could run any code. If you trust whoever wrote it, pass `--allow-unsafe-pickle`."
    )


def shown(value: Any) -> str:
    """``value`` for a message: a short text, however large it is."""
    return (value[:200] if isinstance(value, str) else reprlib.repr(value))[:200]
