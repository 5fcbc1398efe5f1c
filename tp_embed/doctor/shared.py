"""Checks that all nodes share a directory, such as for checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from .findings import Finding
from .job import Job
from .meeting import Meeting

_PATIENCE = 5.0  # Seconds that a network file system may take to show a new file.


def check(meeting: Meeting, job: Job, directory: str) -> dict[int, str]:
    """Checks ``directory`` on the first rank of each node. Returns problems by rank, or ``""``.

    All ranks must call it. Removes the files that it writes.
    """
    rank = meeting.rank
    is_first = job.first_of(rank) == rank
    path = Path(directory, f".tp_embed_doctor_{meeting.tell(uuid4().hex)}")
    own = path.with_name(f"{path.name}_{rank}")
    try:
        problem = _write(own, "") if is_first else ""
        if rank == 0:
            problem = problem or _write(path, path.name)
        meeting.tell(None)  # It is written.
        if is_first and rank and not problem:
            problem = _wait_for(path)
        return meeting.share(problem)
    finally:
        for each in (own, path) if rank == 0 else (own,):
            with suppress(OSError):  # Then it could not be written either, as reported.
                each.unlink(missing_ok=True)


def judge(job: Job, problems: Mapping[int, str], directory: str) -> Iterator[Finding]:
    """Yields findings on the directory.

    :param problems: the results of :func:`check`.
    """
    for rank, problem in problems.items():
        if problem:
            yield Finding(
                "error",
                "shared",
                f"{directory} {problem}",
                (rank,),
                "mount one directory on all nodes, writable for the user of the job",
            )
    if not any(problems.values()):
        nodes = "one directory on all nodes" if len(job.nodes) > 1 else "writable"
        yield Finding("ok", "shared", f"{directory} is {nodes}", tuple(job.facts))


def _write(path: Path, text: str) -> str:
    try:
        path.write_text(text)
    except OSError as e:
        return f"cannot be written to: {e.strerror}"
    return ""


def _wait_for(path: Path) -> str:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            if path.read_text() == path.name:
                return ""
            problem = "has the file that rank 0 wrote, but not its contents"
        except OSError:
            problem = "is not the directory that rank 0 sees"
        if time.monotonic() > end:
            return problem
        time.sleep(0.1)
