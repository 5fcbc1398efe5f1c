"""What the directory of a rank has: a table in use, or a snapshot, a copy of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tp_embed.mapped.files import check_size, copy_file, nbytes, sync, write_file
from tp_embed.mapped.journal import DAMAGED, Record

Header = Mapping[str, Any]

BOOT = Path("/proc/sys/kernel/random/boot_id")


def has_table(path: Path, header: Header) -> bool:
    """Returns whether the directory of a rank has a table.

    :raises ValueError: it has another one, or one that is not whole.
    """
    if (path / "snapshot.json").exists():
        raise ValueError(
            f"`{path}` must hold a table in use, but has a snapshot. Choose another directory, "
            "and restore the snapshot there."
        )
    if not (path / "table.json").exists():
        return False
    found = json.loads((path / "table.json").read_text())
    if found != header:
        expected, other = difference(header, found)
        raise ValueError(
            f"`{path}` must hold a table with {expected}, but has one with {other}. Choose "
            "another directory, or delete this one."
        )
    if (path / "rewriting").exists():
        raise ValueError(
            f"`{path}` must hold a whole table, but a process ended, or failed, while it wrote "
            f"all of it. {DAMAGED}"
        )
    boot = path / "unsaved"
    if boot.exists() and boot.read_text() != BOOT.read_text():
        raise ValueError(
            f"`{path}` must hold all that was written to it, but the machine has stopped, or "
            f"is another one, since the last `flush()`. {DAMAGED}"
        )
    return True


def write_snapshot(path: Path, header: Header, record: Record, files: Iterable[Path]) -> None:
    """Copies ``files`` to the directory ``path``, and waits until they are on the disk. Leaves
    nothing behind if it fails."""
    if (path / "table.json").exists():
        raise ValueError(
            f"`{path}` must not hold a table in use, but does. Copy it to another directory."
        )
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in files:
            copy_file(file, partial / file.name)
        write_file(partial / "snapshot.json", json.dumps([header, record]))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync(path.parent)


def read_snapshot(path: Path, header: Header, weight_bytes: int) -> Record:
    """Returns the record of a snapshot.

    :raises ValueError: there is none, it is of another table, or its files are too short.
    """
    file = path / "snapshot.json"
    if not file.exists():
        raise ValueError(f"`{path}` must hold a snapshot of this table, but has none.")
    found, record = json.loads(file.read_text())
    if found != header:
        expected, other = difference(header, found)
        raise ValueError(
            f"`{path}` must hold a snapshot of a table with {expected}, but has one with {other}."
        )
    sizes = {name: nbytes(*of_record(entry)) for name, entry in record["tensors"].items()}
    for name, size in {"weight": weight_bytes, **sizes}.items():
        check_size(path / f"{name}.bin", size, "Choose another snapshot.")
    read: Record = record
    return read


def of_record(entry: tuple[list[int], str]) -> tuple[tuple[int, ...], torch.dtype]:
    """Returns the shape and dtype of a tensor by its entry in a record."""
    shape, dtype = entry
    return tuple(shape), getattr(torch, dtype)


def difference(header: Header, found: Header) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the entries that differ, of each."""
    keys = [key for key in header if found.get(key) != header[key]]
    return {key: header[key] for key in keys}, {key: found.get(key) for key in keys}
