"""Prepares the machine's memory for a benchmark, and measures a process's share."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch


def touch_memory() -> None:
    """Touches all free memory.

    A virtual machine gets a page from its host on first touch, at about 10 us each, so the first
    process to use much memory takes twice as long. Takes up to a minute.
    """
    nbytes = int(0.9 * os.sysconf("SC_AVPHYS_PAGES")) * mmap.PAGESIZE
    with mmap.mmap(-1, nbytes) as memory:
        torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE].fill_(1)


def peak() -> int:
    """Returns the peak resident set of this process, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    """Resets the peak resident set to the current one."""
    Path("/proc/self/clear_refs").write_text("5")
