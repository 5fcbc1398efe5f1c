"""Files whose bytes are tensors, and copies of them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# Advice of Linux 5.14; earlier kernels answer EINVAL, and pages come when they are touched.
_POPULATE_WRITE = 23

_FICLONE = 0x40049409  # Shares the blocks of a file with another, in `linux/fs.h`.


class MappedFile:
    """A file that is mapped to memory, shared: what is written to ``bytes`` is in the file at once
    for every process, also when this one is killed, and on the disk after :meth:`flush`.

    Its space on the disk is reserved, so a full disk raises here, and not in the middle of a step.

    :param size: the size in bytes; a larger or new file reads as zeros at its end.
    :raises OSError: the disk is full, or permission is missing.
    """

    bytes: Tensor

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _reserve(file, self.size)
            self.map = mmap.mmap(file, self.size)
        finally:
            os.close(file)
        # Else the kernel reads and maps the neighbors of a row, too.
        self._advise_range(mmap.MADV_RANDOM, 0, self.size)
        self._advise_range(mmap.MADV_NOHUGEPAGE, 0, self.size)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self._is_present = torch.zeros(self.size // mmap.PAGESIZE, dtype=torch.bool)
        self.present = 0

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns the first bytes as a tensor."""
        return self.bytes[: nbytes(shape, dtype)].view(dtype).view(shape)

    def absent(self, rows: Tensor, row_bytes: int) -> Tensor:
        """Returns the pages of some rows that :meth:`populate` has not mapped yet, ascending."""
        rows = rows.long()
        first = rows * row_bytes // mmap.PAGESIZE
        if mmap.PAGESIZE % row_bytes:  # Rows cross the bounds of pages.
            last = ((rows + 1) * row_bytes - 1) // mmap.PAGESIZE
            most = (row_bytes - 2) // mmap.PAGESIZE + 2
            between = first[:, None] + torch.arange(most)
            first = torch.minimum(between, last[:, None]).flatten()
        absent: Tensor = first[~self._is_present[first]].unique()
        return absent

    def populate(self, pages: Tensor) -> None:
        """Maps some pages for writing. Touching them would cost more: reading a page maps 15
        neighbors too, and writing to it then faults again. (Adding zero to a word of each would be
        faster, but not safe while another thread writes.)

        :param pages: distinct ones, ascending.
        """
        self._advise(_POPULATE_WRITE, pages)
        self._is_present[pages] = True
        self.present += len(pages)

    def fetch(self, pages: Tensor) -> None:
        """Starts to read some pages from the disk, all at once. They are distinct and ascending."""
        self._advise(mmap.MADV_WILLNEED, pages)

    def _advise(self, advice: int, pages: Tensor) -> None:
        is_apart = torch.ones(len(pages) + 1, dtype=torch.bool)
        is_apart[1:-1] = pages.diff() > 1
        starts = pages[is_apart[:-1]] * mmap.PAGESIZE
        sizes = (pages[is_apart[1:]] + 1) * mmap.PAGESIZE - starts
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            self._advise_range(advice, start, size)

    def _advise_range(self, advice: int, start: int, size: int) -> None:
        try:
            self.map.madvise(advice, start, size)
        except OSError as e:
            if e.errno != errno.EINVAL:  # This kernel does not know the advice.
                raise

    def release(self) -> None:
        """Takes the pages of the file out of this process. They stay in the page cache of the
        system, and come back when they are read."""
        self.map.madvise(mmap.MADV_DONTNEED)
        self._is_present.zero_()
        self.present = 0

    def flush(self) -> None:
        """Waits until the file is on the disk."""
        self.map.flush()
        sync(self.path)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Returns the size in bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def check_size(path: Path, size: int, fix: str) -> None:
    """Checks that a file has at least ``size`` bytes.

    :param fix: what to do otherwise.
    :raises ValueError: it is missing or shorter.
    """
    found = path.stat().st_size if path.exists() else None
    if found is None or found < size:
        but = "is missing" if found is None else f"has {found}"
        raise ValueError(f"`{path}` must have at least {size} bytes, but {but}. {fix}")


def _reserve(file: int, size: int) -> None:
    if os.fstat(file).st_size < size:
        os.posix_fallocate(file, 0, size)


def copy_file(source: Path, target: Path) -> None:
    """Copies ``source`` to ``target``, in place if that exists, and waits until it is on the disk.
    Shares blocks where the file system can, as XFS and Btrfs do, and skips holes elsewhere."""
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    writer = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(reader).st_size
        os.ftruncate(writer, 0)
        try:
            fcntl.ioctl(writer, _FICLONE, reader)
        except OSError:
            _reserve(writer, size)
            for start, stop in _extents(reader, size):
                os.lseek(writer, start, os.SEEK_SET)
                while start < stop:
                    start += os.sendfile(writer, reader, start, stop - start)
        os.fsync(writer)
    finally:
        os.close(reader)
        os.close(writer)


def _extents(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the parts of a file that are not holes."""
    stop = 0
    while stop < size:
        try:
            start = os.lseek(file, stop, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # A hole up to the end.
                return
            raise
        stop = os.lseek(file, start, os.SEEK_HOLE)
        yield start, stop


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_file(path: Path, text: str) -> None:
    """Writes a small file atomically, and waits until it is on the disk."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    sync(new)
    new.replace(path)
    sync(path.parent)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keeps other processes from opening ``what`` meanwhile.

    :raises ValueError: another process, or this one, has it open.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{what} must not be open, but is, in another process or in this one. Wait until "
                "the other run ends, close its `MappedTable`, or choose another directory."
            ) from None
        yield
    finally:
        os.close(file)
