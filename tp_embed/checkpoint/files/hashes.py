"""SHA-256 of files: what is read is compared with what its checkpoint says while it is used, and
what is written is hashed on the way."""

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

# To read or to hash fewer bytes takes less time than handing that to another thread.
SMALL_BYTES = 2**18


def page_aligned(nbytes: int) -> mmap.mmap:
    """Memory that begins with a page. The system copies out of its cache into it several times as
    fast as into a `bytearray`, which begins 16 bytes after one: on AMD's processors."""
    return mmap.mmap(-1, nbytes)


class RunningHash:
    """The hash of a file while it is written: of what comes in the order of the file as it comes,
    when it is in memory anyway. The rest is read again at the end.

    The file must hold what is before the first byte that is written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found = hashlib.sha256()
        self._end = 0
        self._pool = ThreadPoolExecutor(1)

    @contextmanager
    def following(self, offset: int, written: memoryview) -> Iterator[None]:
        """Goes over ``written`` while the block writes it to the file at ``offset``."""
        if offset < self._end:  # Something is written anew.
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
        """The hash of the file, all of which has been written."""
        self._pool.shutdown()
        self._read(self._file.stat().st_size)
        return self._found.hexdigest()

    def _read(self, end: int) -> None:
        _update(self._found, self._file, self._end, end)
        self._end = end


def finish_all(hashes: Sequence[RunningHash]) -> list[str]:
    """What each finishes with; as many are read at a time as there are cores."""
    with _pool(len(hashes)) as pool:
        return list(pool.map(RunningHash.finish, hashes))


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
    _update(found, file, 0, file.stat().st_size, stop)
    return found.hexdigest()


def _update(
    found: hashlib._Hash, path: Path, start: int, end: int, stop: Event | None = None
) -> None:
    """Goes over the bytes of a file from ``start`` to ``end``, or until ``stop``."""
    if start == end:
        return
    with path.open("rb", buffering=0) as file, page_aligned(_BLOCK_BYTES) as block:
        file.seek(start)
        while start < end and not (stop and stop.is_set()):
            with memoryview(block) as view, view[: end - start] as part:
                count = file.readinto(part)
                if not count:  # It was truncated; its hash will be another.
                    return
                found.update(part[:count])
            start += count
