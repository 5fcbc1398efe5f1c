"""A deadline that kills this process even if it is stopped."""

from __future__ import annotations

import ctypes
import errno
import signal
import sys
from typing import Final

_CLOCK_MONOTONIC: Final = 1
_SIGEV_SIGNAL: Final = 0


class _Event(ctypes.Structure):
    """``struct sigevent`` of Linux, 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_byte * 48),
    )


class _Times(ctypes.Structure):
    """``struct itimerspec``: the interval, and the first expiration."""

    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in ("every_seconds", "every_nanoseconds", "seconds", "nanoseconds")
    )


class Deadline:
    """Has the kernel kill this process (SIGKILL) unless :meth:`postpone` is called in time.

    A thread can't do that: it doesn't run while the process is stopped (SIGSTOP), or while another
    thread holds the GIL. A kernel timer (``timer_create``) runs, and SIGKILL reaches stopped
    processes too. Forked processes do not inherit it. No-op on other systems than Linux.
    """

    def __init__(self) -> None:
        self._timer: ctypes.c_void_p | None = None
        if not sys.platform.startswith("linux"):
            return
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        event = _Event(None, signal.SIGKILL, _SIGEV_SIGNAL)
        self._check(
            self._libc.timer_create(
                _CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
            )
        )

    def postpone(self, seconds: float) -> None:
        """Moves the deadline to ``seconds`` from now; 0 disarms it."""
        if self._timer is None:
            return
        whole = int(seconds)
        times = _Times(0, 0, whole, int((seconds - whole) * 1e9))
        self._check(self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None))

    def _check(self, result: int) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"no timer for the watchdog: {errno.errorcode.get(number)}")
