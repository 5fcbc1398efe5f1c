"""Run by test_failure.py: pairs of ranks communicate until one of them fails in the way of its
pair. One process forks all pairs, which run at once, and writes how they ended. Torch only."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tp_embed import ProcessGroupGang
from tp_embed.watchdog import Watchdog, watch

STEPS = 300
TIMEOUT = 4
LONG = 60  # Only immediate failures are noticed within it.
# The failure, its rank, and the timeout of the watchdog.
PAIRS = {
    "rest": (0, TIMEOUT),
    "hang": (1, TIMEOUT),
    "keep": (1, TIMEOUT),
    "exit": (1, LONG),
    "raise": (1, LONG),
    "caught": (1, LONG),
    "orphan": (1, LONG),
    "kill": (0, LONG),
    "stop": (0, TIMEOUT),
}


def do(what: str) -> None:
    if what == "rest":
        time.sleep(TIMEOUT / 2)
    elif what == "hang":
        time.sleep(1000)
    elif what == "keep":
        ctypes.PyDLL(None).sleep(1000)  # Blocks all other threads.
    elif what == "exit":
        sys.exit()
    elif what in ("raise", "caught"):
        raise ValueError("a bug")
    elif what == "orphan" and os.fork() == 0:
        time.sleep(10)  # As a DataLoader worker does for a while, with all sockets open.
        os._exit(0)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what:
        os.kill(os.getpid(), signal.SIGKILL)


def exchange(what: str) -> None:
    gang = ProcessGroupGang(None, "cpu")
    tensor, output = torch.ones(4), torch.empty(gang.size, 4)
    for step in range(STEPS):
        if step == STEPS // 2:
            do(what)
        gang.all_gather(output, tensor)


def work(what: str, rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    who, timeout = PAIRS[what]
    mine = what if rank == who else ""
    if what == "exit":  # Until the process ends.
        Watchdog.start(timeout)
        exchange(mine)
        return
    if what == "caught":  # As a framework that ends the process in its own way.
        Watchdog.start(timeout)
        try:
            exchange(mine)
        except Exception as e:
            Watchdog.report(e)
            sys.exit(1)
    with watch(timeout) as watchdog:
        exchange(mine)
        assert Watchdog.start(timeout) is watchdog
        if mine:
            time.sleep(TIMEOUT + 1)  # No rank waits for it in a collective.
    with watch(timeout):  # Another one, after the first.
        exchange("")
    print(f"rank {rank} is done")


def fork(what: str, rank: int, address: str, output: Path) -> int:
    """Returns the pid of the working process; in that process, 0, after its work."""
    if pid := os.fork():
        return pid
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    work(what, rank, address)
    return 0


def main(directory: Path) -> None:
    pids = {}
    for what in PAIRS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        for rank in range(2):
            pid = fork(what, rank, address, directory / f"{what}.txt")
            if not pid:
                return
            pids[pid] = (what, rank)
    begin = time.monotonic()
    seen: dict[str, dict[int, tuple[int, float]]] = {what: {} for what in PAIRS}
    while pids and time.monotonic() < begin + LONG:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.05)
        elif pid in pids:
            what, rank = pids.pop(pid)
            seconds = time.monotonic() - begin
            seen[what][rank] = (os.waitstatus_to_exitcode(status), seconds)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    (directory / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
