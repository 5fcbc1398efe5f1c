"""Reads untrusted text files of checkpoints: JSON, and names of other files."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsafeCheckpointError, shown

# The index of a large model has a few MB.
_MAX_BYTES = 256 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    :raises CheckpointError: the file holds something else, or an object has a duplicate key.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(
            f"`{path}` must have at most {_MAX_BYTES} bytes, but has {path.stat().st_size}."
        )
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parses ``text``, from ``path``, as a JSON object.

    :raises CheckpointError: as :func:`read_json`.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=lambda pairs: _object(pairs, path))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"`{path}` must be JSON, but is not: {e}. Copy it again.") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` must hold a JSON object, but holds {shown(value)}.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def inside(directory: Path, name: Any, named_by: Path) -> Path:
    """Returns the path of the file ``name`` in ``directory``.

    :param named_by: the file that contains the name.
    :raises CheckpointError: the file does not exist.
    :raises UnsafeCheckpointError: ``name`` points outside ``directory``.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"`{named_by}` must name files, but names {name!r}.")
    path = directory / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UnsafeCheckpointError(
            f"`{named_by}` must name files within `{directory}`, but names `{name}`."
        )
    if not os.path.isfile(path):
        raise CheckpointError(
            f"`{named_by}` names `{name}`, but there is no such file in `{directory}`. Copy the "
            "whole directory."
        )
    return path


def _object(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)[:5]
        raise CheckpointError(f"`{path}` must not have a key twice, but has {twice}.")
    return value
