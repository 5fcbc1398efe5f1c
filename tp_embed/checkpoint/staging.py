"""Writes output atomically: it appears complete or not at all, even if the process is killed.

Output is built in ``.NAME.partial`` next to its destination, synced to disk, and renamed. An
existing ``NAME`` stays in place until then. A journal in the partial directory records which parts
of tensors are written, so that a killed run can be resumed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .contents import Key
from .errors import CheckpointError
from .files.arrays import Index

# The most that is written again after the machine crashes.
_FLUSH_BYTES = 256 * 2**20

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Stage:
    """Output in progress, at ``path`` until it is renamed."""

    def __init__(self, directory: Path, name: str, pool: ThreadPoolExecutor) -> None:
        self.path = directory / name
        self._journal = directory / "journal"
        self._pool = pool
        self._files: list[Path] = []
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._flushed: Future[None] | None = None
        # The last line may be cut off.
        self._before = set(self._journal.read_text().split("\n")[1:-1])

    def is_done(self, key: Key, start: Index, shape: Index) -> bool:
        """Returns whether an earlier run has written the box of ``shape`` at ``start``."""
        return _line(key, start, shape) in self._before

    def done(self, key: Key, start: Index, shape: Index, nbytes: int) -> None:
        """Records that the box is written."""
        if not self.is_done(key, start, shape):
            self._pending.append(_line(key, start, shape))
            self._pending_bytes += nbytes
        if self._pending_bytes >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Starts to sync the recorded boxes to disk, and then the journal."""
        self.wait()
        self._flushed = self._pool.submit(self._flush, self._pending)
        self._pending, self._pending_bytes = [], 0

    def wait(self) -> None:
        """Waits for the last :meth:`flush`."""
        if self._flushed is not None:
            self._flushed.result()

    def _flush(self, lines: Sequence[str]) -> None:
        for file in self._files:
            _sync_one(file)
        with self._journal.open("a") as journal:
            journal.writelines(f"{line}\n" for line in lines)
            journal.flush()
            os.fsync(journal.fileno())

    def laid_out(self) -> None:
        """Records that all files exist at their full sizes.

        :raises CheckpointError: their content will not fit on the disk.
        """
        self._files = files_of(self.path)
        sizes = [file.stat() for file in self._files]
        needed = sum(max(0, size.st_size - 512 * size.st_blocks) for size in sizes)
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise CheckpointError(
                f"The file system of `{self.path.parent.parent}` must have {needed} bytes free for "
                f"the output, but has {free}. Free some, or choose another place."
            )
        sync(self.path)
        if not self._before:
            # The journal is valid for these inodes only, not for new files of the same names.
            files = {
                str(file.relative_to(self.path.parent)): _inode(file)
                for file in self._files
                if not file.name.startswith(".")  # Some of these are rewritten.
            }
            self._flush([json.dumps(files)])


@contextmanager
def staged(
    output: Path, *, request: Any = None, resume: bool = False, overwrite: bool = False
) -> Iterator[Stage]:
    """Yields a stage whose ``path`` is renamed to ``output`` after the block, and removed if the
    block raises.

    :param request: identifies the work, as JSON: only the same work is resumed.
    :param resume: continue a killed run that wrote to ``output``. A ``KeyboardInterrupt`` keeps
        the partial output for this.
    :param overwrite: replace an existing ``output`` atomically.
    :raises FileExistsError: ``output`` exists and is not an empty directory.
    :raises CheckpointError: another process is writing to ``output``, the partial output belongs
        to other work, its name is taken, ``output`` is a device or a mount point, the disk is full,
        or permission is missing.
    """
    output = output.resolve()
    check_free(output, overwrite)
    partial = output.with_name(f".{output.name}.partial")
    with _explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial, output):
            check_free(output, overwrite)  # Another process may have written it meanwhile.
            _begin(partial, json.dumps(request, sort_keys=True), resume)
            try:
                with ThreadPoolExecutor(1) as pool:
                    stage = Stage(partial, output.name, pool)
                    yield stage
                sync(stage.path)
                # `_publish` may move the old output into `partial`: nothing to resume from.
                (partial / "journal").unlink()
                _sync_one(partial)
                _publish(stage.path, output)
            except KeyboardInterrupt:
                raise
            except BaseException:
                _remove(partial)
                raise
            _remove(partial)
            _sync_one(output.parent)


def check_free(output: Path, overwrite: bool = False) -> None:
    """Checks that ``output`` is free.

    :raises FileExistsError: it exists, is no empty directory, and ``overwrite`` is false.
    :raises CheckpointError: it can't be replaced.
    """
    if os.path.lexists(output) and not (output.is_file() or output.is_dir()):
        kind = "a link to nothing" if output.is_symlink() else "a device, pipe or socket"
        raise CheckpointError(
            f"`{output}` must be new, a file or a directory, but is {kind}, which is never "
            "replaced. Choose another name."
        )
    if os.path.ismount(output):
        raise CheckpointError(
            f"`{output}` must be a name that can be replaced, but is the root of a mounted file "
            f"system. Write into it: `{output / 'NAME'}`."
        )
    is_free = not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not overwrite:
        raise FileExistsError(
            f"`{output}` must be new or an empty directory, but holds something already. Choose "
            "another name, remove it first, or pass `--overwrite`."
        )


def files_of(path: Path) -> list[Path]:
    """Returns the file ``path``, or all files in the directory ``path``."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def sync(path: Path) -> None:
    """Syncs ``path`` to disk, recursively."""
    for file in files_of(path):
        _sync_one(file)
    for directory in [path, *path.rglob("*")]:
        if directory.is_dir():
            _sync_one(directory)


def write_text(path: Path, text: str) -> None:
    """Does ``path.write_text(text)`` atomically, for a file that others may be reading."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    _sync_one(temporary)
    temporary.replace(path)


def _line(key: Key, start: Index, shape: Index) -> str:
    """Formats a box for the journal. As JSON, since names can have any characters."""
    return json.dumps([*key, start, shape])


def _begin(partial: Path, request: str, resume: bool) -> None:
    journal = partial / "journal"
    # The request, the files, and what was written; the last line may be cut off.
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    if not resume or len(lines) < 2:
        _empty(partial)
        journal.write_text(request + "\n")
        _sync_one(journal)
    elif lines[0] != request:
        raise CheckpointError(
            f"`{partial}` must come from the same conversion of the same source to be resumed, but "
            f"comes from {lines[0]}, not from {request}. Convert without `--resume`."
        )
    elif any(_inode(partial / name) != inode for name, inode in json.loads(lines[1]).items()):
        raise CheckpointError(
            f"`{partial}` must hold the files that the interrupted run created to be resumed, but "
            "does not. Convert without `--resume`."
        )


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.is_file() else None


@contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """Makes the directory ``partial`` if there is none, and locks ``output`` against other
    writers."""
    file = None
    while file is None:
        with suppress(FileNotFoundError):  # Another process has just removed it.
            _check_ours(partial, output)
            with suppress(FileExistsError):
                os.mkdir(partial)
            file = _lock(partial / "lock", output)
    try:
        yield
    finally:
        os.close(file)


def _check_ours(partial: Path, output: Path) -> None:
    """Checks that nobody else has a file, link or directory at ``partial``, which is emptied."""
    found = "a link or a file"
    if partial.is_dir() and not partial.is_symlink():
        names = set(os.listdir(partial))
        strange = names - {"lock", "journal", output.name}
        if not strange and (not names or "lock" in names):
            return
        found = f"a directory with {sorted(strange or names)[:5]}"
    elif not os.path.lexists(partial):
        return
    raise CheckpointError(
        f"`{partial}` must be free for the output in progress, or left by an earlier run, but is "
        f"{found}. Move it, or choose another output."
    )


def _lock(path: Path, output: Path) -> int | None:
    """Returns a locked file, or ``None`` if the process that wrote here before has removed it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), path.lstat()):
            kept, file = file, -1
            return kept
    except BlockingIOError as e:
        raise CheckpointError(
            f"`{output}` must be written by one process, but another is writing it. Wait for "
            "it, or end it."
        ) from e
    finally:
        if file >= 0:
            os.close(file)
    return None


def _remove(partial: Path) -> None:
    """Removes the directory, the lock last: until then no other process may write here."""
    _empty(partial)
    (partial / "lock").unlink()
    with suppress(OSError):  # Another process has locked it.
        partial.rmdir()


def _empty(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _publish(path: Path, output: Path) -> None:
    """Renames ``path`` to ``output``. An existing ``output`` moves to ``path``."""
    try:
        os.replace(path, output)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
            raise
        _exchange(path, output)
    _sync_one(output.parent)


def _exchange(first: Path, second: Path) -> None:
    """Swaps two names atomically, with :manpage:`renameat2(2)` of Linux."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    if failed:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(second))
        raise CheckpointError(
            f"The file system of `{second}` must be able to swap two names atomically, but is not. "
            "Write to a new name, and remove the old one."
        )


def _sync_one(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Translates system errors into what they mean for ``output``."""
    try:
        yield
    except OSError as e:
        reasons = {
            errno.ENOSPC: "must have space for it, but is full. Free some, or choose another place",
            errno.EDQUOT: "must have space for it, but your quota is used up. Free some",
            errno.EACCES: "must be open to you for writing, but is not. Change who may write there",
            errno.EPERM: "must be open to you for writing, but is not. Change who may write there",
            errno.EBUSY: "must let its name be replaced, but is in use there. Choose another name",
            errno.EROFS: "must be writable, but is mounted read-only. Choose another place",
        }
        if e.errno not in reasons or isinstance(e, FileExistsError):
            raise
        raise CheckpointError(
            f"`{output}` has not been written. The file system {reasons[e.errno]}. ({e})"
        ) from e
