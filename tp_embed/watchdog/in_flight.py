"""Finds the collective that this process waits in, from torch's flight recorder.

The recorder is on by default (`TORCH_FR_BUFFER_SIZE`, 2000 entries) and records every collective of
every process group, ours and DeepSpeed's, so collectives need no instrumentation.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import distributed_c10d

from tp_embed._torch_private import group_statuses, ranks_of_group, recorded_collectives

_WATCHDOG = str(Path(__file__).parent)
_LIBRARY = str(Path(__file__).parent.parent)


@dataclass(frozen=True)
class Place:
    """Where this process is, and the global ranks of the gang of its collective."""

    text: str
    gang: list[int]


def find_place(error: BaseException | None = None) -> Place:
    """Finds where this process is, or where ``error`` was raised. Takes about 40 ms, so call it
    only after a failure."""
    entries = recorded_collectives()
    if waiting := _waiting(entries):
        first = min(waiting, key=_begin)
        seconds = time.time() - _begin(first)
        return Place(f"has been in {_describe(first)} for {seconds:.1f} s", _gang(first))
    last = max(entries, key=_begin, default=None)
    if last is None:
        return Place(f"is in {_innermost_line()}, and has been in no collective", [])
    if error is not None and is_of_collective(error):
        return Place(f"failed in {_describe(last)}", _gang(last))
    return Place(f"is in {_innermost_line()}, in no collective; its last was {_describe(last)}", [])


def _waiting(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if not entry["retired"]]


def _begin(entry: dict[str, Any]) -> float:
    return float(entry["time_created_ns"]) / 1e9


def _describe(entry: dict[str, Any]) -> str:
    operation = entry["profiling_name"].partition(":")[2]
    inputs = zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
    tensors = "".join(f" of {tuple(sizes)} {dtype}" for sizes, dtype in inputs)
    name = entry["process_group"][1]
    label = "" if name == "undefined" else f" ({name})"
    number = entry["collective_seq_id"]
    return f"`{operation}`{tensors}, collective {number} of the gang of ranks {_gang(entry)}{label}"


def _gang(entry: dict[str, Any]) -> list[int]:
    return ranks_of_group(entry["process_group"][0])


def is_of_collective(error: BaseException | None) -> bool:
    """Returns whether ``error``, or one of its causes, was raised in a collective."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == distributed_c10d.__file__:
                return True
        error = error.__cause__
    return False


class Patience:
    """Detects gloo collectives that take longer than ``seconds``. (torch itself times out NCCL's,
    by the timeout of their process group.)"""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[str, tuple[str, float]] = {}

    def is_over(self) -> bool:
        """Returns whether a collective takes too long. Takes some microseconds; detects it late by
        up to the time between two calls."""
        now = time.monotonic()
        statuses = group_statuses()
        over = False
        for group, status in statuses.items():
            done = status["last_completed_collective"]
            before, since = self._since.get(group, ("", now))
            if done == status["last_enqueued_collective"] or done != before:
                since = now
            self._since[group] = (done, since)
            over = over or now - since > self._seconds
        if over and not _waiting(recorded_collectives()):
            # The last two collectives completed out of order.
            self._since.clear()
            return False
        return over


def stacks() -> str:
    """Formats the stacks of all threads but the watchdog's, the most recent call last."""
    frames = sys._current_frames()
    text = ""
    for thread in threading.enumerate():
        lines = _lines(frames.get(thread.ident or 0))
        if any(file.startswith(_WATCHDOG) for file, _, _ in lines):
            continue
        text += f"  Thread {thread.name}:\n"
        for file, number, function in reversed(lines):
            text += f'    File "{file}", line {number}, in {function}\n'
    return text.removesuffix("\n")


def _innermost_line() -> str:
    """Describes the innermost line of the main thread outside of libraries."""
    lines = _lines(sys._current_frames().get(threading.main_thread().ident or 0))
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    own = [line for line in lines if not line[0].startswith((*libraries, _LIBRARY, "<"))]
    for file, number, function in own or lines:
        return f"{Path(file).name}:{number} `{function}`"
    return "no line of Python"


def _lines(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """Returns the file, line and function of each call of a stack, innermost first."""
    lines = []
    while frame is not None:
        lines.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return lines
