"""Directories that are there as a whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def staged(output: str | Path) -> Iterator[Path]:
    """An empty directory beside ``output``, which takes the name of ``output`` when the block is
    left, and is gone if the block raises. Its parent is a directory for what is not to stay.

    :raises FileExistsError: ``output`` is there already, and not an empty directory.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"`{output}` must be a new or an empty directory, but holds something already. "
            "Choose another name, or remove it first."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        directory = Path(scratch) / output.name
        directory.mkdir()
        yield directory
        os.replace(directory, output)


def write_text(path: Path, text: str) -> None:
    """As ``path.write_text(text)``, for a file that others may be reading."""
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        file.write_text(text)
        os.replace(file, path)
