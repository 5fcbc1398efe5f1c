"""Bounds the memory that mapped files take in this process.

Pages of mapped files count in its resident memory (RSS) once they were touched, until they are
released. A thread looks at their size and releases them, also while the files are in use: a page
comes back from the page cache when it is touched again. So everything that walks over a table is
bounded: initial values, checkpoints, exports.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

_STATM = Path("/proc/self/statm")
_INTERVAL = 0.02  # In seconds.


class ResidentLimit:
    """Calls ``release`` whenever the file-backed memory of the process has grown by more than the
    limits of all that are open.

    :param limit: in bytes.
    :param release: releases mapped pages; called by a thread.
    """

    _open: ClassVar[list[ResidentLimit]] = []

    def __init__(self, limit: int, release: Callable[[], None]) -> None:
        self._limit, self._release = limit, release
        self._before = mapped_bytes()
        self._stopped = threading.Event()
        self._open.append(self)
        self._thread = threading.Thread(target=self._watch, name="tp_embed resident", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            others = list(self._open)
            base = min((one._before for one in others), default=0)
            if mapped_bytes() - base > sum(one._limit for one in others):
                self._release()

    def stop(self) -> None:
        """Ends the thread."""
        if self in self._open:
            self._open.remove(self)
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


def mapped_bytes() -> int:
    """Returns the resident memory of this process that is shared: files and shared memory."""
    return int(_STATM.read_text().split()[2]) * mmap.PAGESIZE


def can_measure() -> bool:
    """Returns whether this system tells the memory of a process."""
    return _STATM.exists()
