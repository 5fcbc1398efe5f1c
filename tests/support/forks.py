"""Forks processes from one that has imported the libraries: starting a rank takes a tenth of a
second for five."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from launch import ROOT, environment, free_port, remove_shared_memory

_IMPORTED = [
    "torch.distributed",
    "tp_embed.surgery.shard",
    "tp_embed.integrations.deepspeed",
    "tp_embed.integrations.transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "torch._dynamo.backends.debugging",
    "torch._inductor.compile_fx",
]


def fork_context() -> Any:
    """Returns the context of :mod:`multiprocessing` whose processes have imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def run_script(
    script: Path | str, *args: object, ranks: int = 2, cwd: Path | str = ROOT, timeout: float = 240
) -> str:
    """Runs ``script`` on several ranks, in the environment that launchers give it, and returns what
    they print. If one fails, or all take too long, ends all, and fails the test with their output
    and their stacks."""
    port = free_port()
    shared: dict[str, object] = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "CROSS_RANK": 0,
        "CROSS_SIZE": 1,
    }
    shared |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        processes = []
        for rank in range(ranks):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            variables = environment() | {name: str(value) for name, value in own.items()}
            job = [str(script), *map(str, args)], variables, str(cwd), str(output), sys.path
            processes.append(fork_context().Process(target=_run, args=job))
        try:
            failure = _join(processes, timeout)
        finally:
            remove_shared_memory([f"--master_port={port}"])
        text = output.read_text(errors="replace")
    assert not failure, f"{script} {failure}:\n{text}"
    return text


def _join(processes: Sequence[Any], timeout: float) -> str:
    """Starts ``processes`` and waits for them. Returns how they failed, if they did."""
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    running, failure = list(processes), ""
    while running and not failure:
        ended = wait([process.sentinel for process in running], deadline - time.monotonic())
        if not ended:
            failure = f"took more than {timeout} s"
        for process in [process for process in running if process.sentinel in ended]:
            process.join()
            running.remove(process)
            if process.exitcode:
                failure = f"exited with {process.exitcode}"
    for process in running:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)  # Prints the stacks.
    if running:
        time.sleep(0.5)
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return failure


def _run(
    argv: list[str], variables: dict[str, str], cwd: str, output: str, path: list[str]
) -> None:
    os.setsid()
    gc.freeze()  # Collections skip what was imported before the fork.
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(signal.SIGUSR1, file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = argv
    sys.path[:] = [str(Path(argv[0]).parent), *variables["PYTHONPATH"].split(":"), *path]

    import torch

    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
