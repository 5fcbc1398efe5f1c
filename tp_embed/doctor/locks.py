"""Locks that a killed build of an extension has left: every later run waits for them in silence.

torch (:mod:`torch.utils.cpp_extension`), and with it DeepSpeed, builds extensions when they are
first used. Whoever builds makes a file ``lock``, keeps it open, and removes it at the end; the
others wait until it is gone, for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .findings import Finding
from .job import Job


def look() -> dict[str, Any]:
    """Lists the locks of extensions that are being compiled, and who holds them."""
    root, found = build_root(), []
    # By default there is a directory for each version of Python and CUDA between.
    for path in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            stat = path.stat()
            holders = holders_of(path)
        except OSError:
            continue  # It is gone.
        found.append(
            {
                "path": str(path),
                "age": max(time.time() - stat.st_mtime, 0),
                "file": _identity(stat),
                "holders": holders,
            }
        )
    return {"root": str(root), "locks": found}


def build_root() -> Path:
    """Where torch builds extensions."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache, "torch_extensions").expanduser().resolve()


def judge(job: Job, removed: Mapping[int, Mapping[str, str]]) -> Iterator[Finding]:
    """:param removed: what :func:`remove` has returned, on the first ranks of nodes."""
    parts = job.part("locks")
    for rank, part in parts.items():
        for lock in part["locks"]:
            problem = removed.get(job.first_of(rank), {}).get(lock["path"])
            if problem == "":
                what = f"{lock['path']} was stale and is removed"
                yield Finding("ok", "locks", what, (rank,))
                continue
            building = _builders(job, lock)
            if building:
                what = f"{lock['path']} is held by {building}, which builds an extension"
                yield Finding("note", "locks", f"{what}; ranks that need it wait", (rank,))
                continue
            yield Finding(
                "error",
                "locks",
                f"{lock['path']} is stale: {_age(lock['age'])} old, and nobody of the job's nodes "
                f"holds it open{problem or ''}. DeepSpeed hangs as it loads the extension",
                (rank,),
                f"rm {lock['path']} (or `tp-embed doctor --fix`)",
            )
    if not any(part["locks"] for part in parts.values()):
        roots = sorted({part["root"] for part in parts.values()})
        yield Finding("ok", "locks", f"no locks in {', '.join(roots)}", tuple(parts))


def remove(job: Job, rank: int) -> dict[str, str]:
    """Removes the stale locks that ``rank`` sees, of its own node.

    :returns: by path, what went wrong; empty if it is gone.
    """
    done = {}
    for lock in job.part("locks")[rank]["locks"]:
        if _builders(job, lock):
            continue
        path = Path(lock["path"])
        try:
            # Another node may have removed it already, and somebody have begun to build.
            if _identity(path.stat()) == lock["file"]:
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError as e:
            done[lock["path"]] = f", but it cannot be removed: {e.strerror}"
            continue
        done[lock["path"]] = ""
    return done


def holders_of(path: Path) -> list[int]:
    """The processes of this node that have the file open, as far as we may see."""
    target, found = os.stat(path), []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = list((directory / "fd").iterdir())
        except OSError:
            continue  # Another user's, or gone.
        for descriptor in descriptors:
            try:
                stat = descriptor.stat()
            except OSError:
                continue
            if (stat.st_dev, stat.st_ino) == (target.st_dev, target.st_ino):
                found.append(int(directory.name))
                break
    return sorted(found)


def _identity(stat: os.stat_result) -> str:
    return f"{stat.st_ino} {stat.st_mtime_ns}"


def _builders(job: Job, lock: dict[str, Any]) -> str:
    """Who holds a lock, on whichever node: the directory may be one that they share."""
    found = {
        f"process {holder} on {job.node_of[rank]}"
        for rank, part in job.part("locks").items()
        for other in part["locks"]
        if (other["path"], other["file"]) == (lock["path"], lock["file"])
        for holder in other["holders"]
    }
    return ", ".join(sorted(found))


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
