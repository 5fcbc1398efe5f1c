"""Computes SHA-256 of files: checks files while they are read, and hashes output on the way."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from ..errors import CheckpointError

_BLOCK_BYTES = 2**20

# Reading or hashing fewer bytes is faster than handing them to another thread.
SMALL_BYTES = 2**18


def page_aligned(nbytes: int) -> mmap.mmap:
    """Allocates page-aligned memory. On AMD processors, the kernel copies from its page cache
    several times faster into it than into a `bytearray`, which starts 16 bytes after a page."""
    return mmap.mmap(-1, nbytes)


class RunningHash:
    """Hashes a file while it is written. Bytes written in file order are hashed from memory, all
    others are read back in :meth:`finish`.

    The file must already hold everything before the first written byte.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found = hashlib.sha256()
        self._end = 0
        self._pool = ThreadPoolExecutor(1)

    @contextmanager
    def following(self, offset: int, written: memoryview) -> Iterator[None]:
        """Hashes ``written`` while the block writes it to the file at ``offset``."""
        if offset < self._end:  # Hashed bytes are overwritten: start again.
            self._found, self._end = hashlib.sha256(), 0
        if offset - self._end > _BLOCK_BYTES:
            yield
            return
        self._read(offset)
        self._end += len(written)
        if len(written) < SMALL_BYTES:
            self._found.update(written)
            yield
            return
        hashed = self._pool.submit(self._found.update, written)
        try:
            yield
        finally:
            hashed.result()

    def finish(self) -> str:
        """Returns the hash of the completely written file."""
        self._pool.shutdown()
        self._read(self._file.stat().st_size)
        return self._found.hexdigest()

    def _read(self, end: int) -> None:
        _update(self._found, self._file, self._end, end)
        self._end = end


def finish_all(hashes: Sequence[RunningHash]) -> list[str]:
    """Finishes all ``hashes``, one per core at a time."""
    with _pool(len(hashes)) as pool:
        return list(pool.map(RunningHash.finish, hashes))


@contextmanager
def checked(hashes: Mapping[Path, str]) -> Iterator[None]:
    """Compares files with their ``hashes`` while the block runs, and waits for the result at its
    end. Don't use the block's output before that.

    :raises CheckpointError: a file has another hash. Raised at the end.
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
                        f"has {found[file].result()} instead. It is damaged, or from another "
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
    _update(found, file, 0, file.stat().st_size, stop)
    return found.hexdigest()


def _update(
    found: hashlib._Hash, path: Path, start: int, end: int, stop: Event | None = None
) -> None:
    """Hashes the bytes of a file from ``start`` to ``end``, or until ``stop``."""
    if start == end:
        return
    with path.open("rb", buffering=0) as file, page_aligned(_BLOCK_BYTES) as block:
        file.seek(start)
        while start < end and not (stop and stop.is_set()):
            with memoryview(block) as view, view[: end - start] as part:
                count = file.readinto(part)
                if not count:  # Truncated; the hash will differ.
                    return
                found.update(part[:count])
            start += count
