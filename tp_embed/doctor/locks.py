"""Finds stale locks of extension builds. Every later run would silently wait for them.

torch (:mod:`torch.utils.cpp_extension`), and with it DeepSpeed, builds extensions on first use. The
builder creates a file ``lock``, keeps it open, and removes it at the end. Others wait for its
removal, without a timeout: a killed build blocks them.
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
    """Lists the locks of extension builds, and the processes that hold them."""
    root, found = build_root(), []
    # By default, a directory per version of Python and CUDA lies in between.
    for path in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            stat = path.stat()
            holders = holders_of(path)
        except OSError:
            continue  # Removed meanwhile.
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
    """Returns the directory where torch builds extensions."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache, "torch_extensions").expanduser().resolve()


def judge(job: Job, removed: Mapping[int, Mapping[str, str]]) -> Iterator[Finding]:
    """Yields findings on locks.

    :param removed: the results of :func:`remove` on the first rank of each node.
    """
    parts = job.part("locks")
    for rank, part in parts.items():
        for lock in part["locks"]:
            problem = removed.get(job.first_of(rank), {}).get(lock["path"])
            if problem == "":
                what = f"{lock['path']} was stale, and was removed"
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
                f"{lock['path']} is stale: {_age(lock['age'])} old, and no process on the job's "
                f"nodes holds it{problem or ''}. DeepSpeed hangs when it loads the extension",
                (rank,),
                f"rm {lock['path']} (or `tp-embed doctor --fix`)",
            )
    if not any(part["locks"] for part in parts.values()):
        roots = sorted({part["root"] for part in parts.values()})
        yield Finding("ok", "locks", f"no locks in {', '.join(roots)}", tuple(parts))


def remove(job: Job, rank: int) -> dict[str, str]:
    """Removes the stale locks that ``rank`` sees on its node.

    :returns: an error by path, empty if the lock is gone.
    """
    done = {}
    for lock in job.part("locks")[rank]["locks"]:
        if _builders(job, lock):
            continue
        path = Path(lock["path"])
        try:
            # Another node may have removed it already, and a new build may have started.
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
    """Returns the visible processes on this node that hold the file open."""
    target, found = os.stat(path), []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = list((directory / "fd").iterdir())
        except OSError:
            continue  # Owned by another user, or ended.
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
    """Names the processes that hold a lock, on any node: nodes may share the directory."""
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
