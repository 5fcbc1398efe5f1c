"""Errors of checkpoints."""

import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or cannot be written as requested. Nothing has been written."""


class UnsafeCheckpointError(CheckpointError):
    """Reading a checkpoint could run code, or reach files outside its directory."""


class MismatchError(CheckpointError):
    """Two checkpoints that should be equal differ."""


def asks_to_import(path: Path, names: Iterable[str]) -> UnsafeCheckpointError:
    """Returns the error for a pickle at ``path`` that imports ``names``."""
    return UnsafeCheckpointError(
        f"`{path}` must hold tensors and plain values only, but asks to import {list(names)}, "
        "which could run any code. If you trust whoever wrote it, pass `--allow-unsafe-pickle`."
    )


def shown(value: Any) -> str:
    """Shortens ``value`` for a message."""
    return (value[:200] if isinstance(value, str) else reprlib.repr(value))[:200]
