"""Whether a directory, as that of checkpoints, is one that all nodes share."""

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
    """What is wrong with ``directory`` on the first rank of each node, if anything is.

    All ranks have to call it. The file that it writes there is gone afterwards.
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
            with suppress(OSError):  # It could not be written either, as is said.
                each.unlink(missing_ok=True)


def judge(job: Job, problems: Mapping[int, str], directory: str) -> Iterator[Finding]:
    """:param problems: as :func:`check` returns them."""
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
            problem = "has the file of rank 0, but not what is in it"
        except OSError:
            problem = "is another directory than that of rank 0"
        if time.monotonic() > end:
            return problem
        time.sleep(0.1)
