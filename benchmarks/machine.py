"""The machine under a benchmark: its memory, and what a process takes of it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch


def touch_memory() -> None:
    """Has the host give this machine all memory that is free.

    A virtual machine gets a page of memory from its host when it first touches it, at some 10 us
    each: what is the first to use that much memory takes twice as long. Takes up to a minute.
    """
    nbytes = int(0.9 * os.sysconf("SC_AVPHYS_PAGES")) * mmap.PAGESIZE
    with mmap.mmap(-1, nbytes) as memory:
        torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE].fill_(1)


def peak() -> int:
    """The largest resident set of this process so far, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    """The largest resident set begins anew, with that of now."""
    Path("/proc/self/clear_refs").write_text("5")
