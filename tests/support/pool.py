"""A pool of processes that run a function on every rank of a gang.

Starting a process takes seconds, so the four processes of the pool serve all tests. A gang of P
uses the *last* P of them: its ranks differ from global ranks, so code that confuses them fails. A
rank that does not answer in time fails the test, with the stacks of all ranks. The pool restarts
after any failure, which may leave collectives half-done. Module constants of the package that a
function sets hold until it returns.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from forks import fork_context

SIZE = 4
TIMEOUT = 60.0

Function = Callable[..., Any]


class RankError(AssertionError):
    """A rank raised or hung; the message shows what all ranks were doing."""


class Pool:
    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._dir = tempfile.TemporaryDirectory()
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(
        self, size: int, function: Function, *args: Any, timeout: float = TIMEOUT, **kwargs: Any
    ) -> list[Any]:
        """Runs ``function(gang, *args, **kwargs)`` on each rank of a gang of ``size`` and returns
        what each rank returned. The function must be importable by name."""
        outcomes = self.outcomes(size, function, *args, timeout=timeout, **kwargs)
        failed = {r: o for r, (ok, o) in enumerate(outcomes) if not ok}
        if failed:
            self.stop()
            raise RankError("\n".join(f"rank {r} of {size}: {o}" for r, o in failed.items()))
        return [value for _, value in outcomes]

    def outcomes(
        self, size: int, function: Function, *args: Any, timeout: float = TIMEOUT, **kwargs: Any
    ) -> list[tuple[bool, Any]]:
        """Like a call, but returns (True, value) or (False, traceback) for each rank."""
        if not self._workers:
            self._start()
        members = self._workers[self._size - size :]
        for _, connection in members:
            connection.send_bytes(pickle.dumps((size, function, args, kwargs)))
        deadline = time.monotonic() + timeout
        outcomes: dict[int, tuple[bool, Any]] = {}
        while len(outcomes) < size:
            waiting = {c: rank for rank, (_, c) in enumerate(members) if rank not in outcomes}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = self._stacks()
                self.stop()
                failed = "".join(f"\nrank {r}: {o}" for r, (ok, o) in outcomes.items() if not ok)
                raise RankError(
                    f"ranks {sorted(waiting.values())} of {size} did not answer within {timeout} s"
                    f"{failed}\n{stacks}"
                )
            for connection in ready:
                rank = waiting[connection]
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = members[rank][0]
                    process.join(5)
                    outcomes[rank] = False, f"died with exit code {process.exitcode}"
                if not outcomes[rank][0]:  # The others may wait forever for this one.
                    deadline = min(deadline, time.monotonic() + 5)
        if any("died with exit code" in str(o) for ok, o in outcomes.values() if not ok):
            self.stop()
        return [outcomes[rank] for rank in range(size)]

    def _start(self) -> None:
        context = fork_context()
        self._dir = tempfile.TemporaryDirectory()
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self._size, self._dir.name, theirs, sys.path),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _stacks(self) -> str:
        for process, _ in self._workers:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        files = sorted(Path(self._dir.name).glob("stack*"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    def close(self) -> None:
        """Lets the workers end by themselves, so that coverage writes its counts."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(30)
        self.stop()

    def stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []
        self._dir.cleanup()


def _serve(
    rank: int, world_size: int, directory: str, connection: Connection, path: list[str]
) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    from tp_embed import ProcessGroupGang

    gc.freeze()  # Collections skip what was imported before the fork.
    torch.set_num_threads(1)
    stack = open(f"{directory}/stack{rank}", "w")  # noqa: SIM115 (faulthandler keeps it)
    faulthandler.register(signal.SIGUSR1, stack)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    world = ProcessGroupGang(None, "cpu")
    gangs = {
        size: world.create_gang(range(world_size - size, world_size))
        for size in range(1, world_size + 1)
    }
    while True:
        try:
            size, function, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            with _constants_kept():
                outcome = True, function(gangs[size], *args, **kwargs)
        except Exception:
            outcome = False, traceback.format_exc()
        # Not `send()`, which would pass tensors in shared memory and keep it open.
        connection.send_bytes(pickle.dumps(outcome))


@contextmanager
def _constants_kept() -> Iterator[None]:
    names = [name for name in sys.modules if name.startswith("tp_embed.")]
    before = [
        (vars(sys.modules[n]), c, vars(sys.modules[n])[c]) for n in names for c in _constants(n)
    ]
    try:
        yield
    finally:
        for module, constant, value in before:
            module[constant] = value


@cache
def _constants(name: str) -> list[str]:
    return [constant for constant in vars(sys.modules[name]) if constant.isupper()]
