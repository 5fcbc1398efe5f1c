"""SHA-256 of files: what is read is compared with what its checkpoint says, while it is used."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from .errors import CheckpointError

_BLOCK_BYTES = 2**20


def sha256(files: Sequence[Path]) -> list[str]:
    """The hash of each file; as many are read at a time as there are cores."""
    never = Event()
    with _pool(len(files)) as pool:
        return list(pool.map(lambda file: _sha256(file, never), files))


@contextmanager
def checked(hashes: Mapping[Path, str]) -> Iterator[None]:
    """Compares files with their ``hashes`` while the block runs, and at its end waits for it. So
    what the block has made must not be used before the end.

    :raises CheckpointError: at the end, a file has another hash.
    """
    stop = Event()
    with _pool(len(hashes)) as pool:
        found = {file: pool.submit(_sha256, file, stop) for file in hashes}
        try:
            yield
            for file, expected in hashes.items():
                if found[file].result() != expected:
                    raise CheckpointError(
                        f"`{file}` must have the SHA-256 {expected}, as its checkpoint says, but "
                        f"has {found[file].result()} instead. It is damaged, or of another "
                        "checkpoint: copy it again."
                    )
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _pool(files: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(files, os.cpu_count() or 1)))


def _sha256(file: Path, stop: Event) -> str:
    found = hashlib.sha256()
    # Into memory that is aligned to a page the system copies several times as fast as into that of
    # a `bytearray`, which begins 16 bytes after one: on AMD's processors.
    with file.open("rb", buffering=0) as opened, mmap.mmap(-1, _BLOCK_BYTES) as block:
        while (count := opened.readinto(block)) and not stop.is_set():
            with memoryview(block) as view, view[:count] as part:
                found.update(part)
    return found.hexdigest()
