"""Runs `tp-embed doctor` and reads what it has found."""

from __future__ import annotations

import json
import subprocess
import sys

from launch import ROOT, environment, free_port

DOCTOR = [sys.executable, "-m", "tp_embed", "doctor"]
PATIENCE = 100.0  # Seconds for a run on a machine that is busy.


class Result:
    """What ``doctor --json`` has found, and how it has ended."""

    def __init__(self, code, output):
        self.code, self.output = code, output
        lines = [line for line in output.splitlines() if line.startswith("{")]
        assert len(lines) == 1, output  # Rank 0 prints, and nobody else does.
        self.data = json.loads(lines[0])

    def find(self, text, level=None):
        """The only finding about ``text``."""
        found = [each for each in self.data["findings"] if text in each["what"]]
        assert len(found) == 1, (text, self.output)
        assert level in (None, found[0]["level"]), found
        return found[0]

    def bad(self):
        return [each for each in self.data["findings"] if each["level"] in ("warning", "error")]


def doctor(*options, ranks=({},), cwds=None, size=None):
    """Runs it on several ranks, each with an environment and a directory of its own."""
    port, processes = free_port(), []
    try:
        for rank, extra in enumerate(ranks):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size or len(ranks)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            processes.append(
                subprocess.Popen(
                    [*DOCTOR, *map(str, options), "--json"],
                    cwd=cwds[rank] if cwds else ROOT,
                    env={**environment(), **(place if (size or len(ranks)) > 1 else {}), **extra},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = {process.returncode for process in processes}
    assert len(codes) == 1, outputs  # All exit alike.
    return Result(codes.pop(), "".join(outputs))
