"""Starts programs on several ranks by the real launchers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Modules that jobs share with tests.
SUPPORT = Path(__file__).parent
BIN = Path(sys.prefix) / "bin"


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": f"{SUPPORT}:{ROOT / 'examples'}",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        "TOKENIZERS_PARALLELISM": "true",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def remove_shared_memory(command: Sequence[str]) -> None:
    """Removes the 66 MiB per rank that DeepSpeed's CPU collectives leave behind."""
    for port in (arg.partition("=")[2] for arg in command if arg.startswith("--master")):
        for file in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
            file.unlink(missing_ok=True)


def deepspeed_command(script: Path | str, *args: object, ranks: int = 2) -> list[str]:
    return [
        str(BIN / "deepspeed"),
        f"--num_gpus={ranks}",
        f"--master_port={free_port()}",
        "--no_local_rank",
        str(script),
        *map(str, args),
    ]


def torchrun_command(script: Path | str, *args: object, ranks: int = 2) -> list[str]:
    return [
        str(BIN / "torchrun"),
        f"--nproc-per-node={ranks}",
        f"--master-port={free_port()}",
        str(script),
        *map(str, args),
    ]


def start(command: Sequence[str], cwd: Path | str = ROOT) -> subprocess.Popen[str]:
    """Starts ``command`` in its own session, so that all its processes can be ended."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(command: Sequence[str], cwd: Path | str = ROOT, timeout: float = 240) -> str:
    """Returns the output of ``command``; a failure or timeout fails the test with it."""
    process = start(command, cwd)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{command} took more than {timeout} s:\n{output}") from None
    finally:
        remove_shared_memory(command)
    assert process.returncode == 0, f"{command} exited with {process.returncode}:\n{output}"
    return output
