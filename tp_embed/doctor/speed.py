"""Times the collectives of a gang, and finds slow ranks and links.

Reports algorithm bandwidth, as nccl-tests does: the bytes of the input or the output, whichever is
larger, divided by the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from tp_embed._torch_private import PrefixStore
from tp_embed.gang import Gang, ReduceOperation
from tp_embed.gang.process_group import ProcessGroupGang

from .findings import Finding, outliers, spread
from .job import Job
from .meeting import Meeting
from .topology import gangs_of

SIZES = (4 * 2**10, 2**20, 16 * 2**20)  # Bytes.
OPERATIONS = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")

_SECONDS = 0.1  # Per operation and size, with at least 3 runs.
_LINK_BYTES = 2**20
_MOST_LINKS = 64


def measure(meeting: Meeting, device: torch.device, tp_size: int | None) -> dict[str, Any]:
    """Times collectives over all ranks, and over all tensor-parallel gangs at once.

    All ranks must call it. Initialises torch.distributed, and destroys the process group at the
    end.

    :returns: the measurements of this rank; ``error`` is the message of a failure.
    """
    found: dict[str, Any] = {}
    # Makes NCCL raise after the timeout instead of ending the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=meeting.timeout / 2)  # The first to fail waits for the others.
    try:
        found["work"] = _time_work(device)
        dist.init_process_group(
            backend,
            store=PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.size,
            timeout=timeout,
        )
        world = ProcessGroupGang(None, device)
        found["world"] = _time_collectives(world)
        if world.size > 1:
            found["links"] = _time_links(world)
        if tp_size is not None and 1 < tp_size < world.size and world.size % tp_size == 0:
            for ranks in gangs_of(world.size, tp_size):
                gang = world.create_gang(ranks)
                if gang is not None:
                    own = gang
            found["gang"] = _time_collectives(own)
    except (RuntimeError, ValueError) as e:
        found["error"] = " ".join(str(e).split())[:300]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return found


def judge(
    job: Job, measured: Mapping[int, Mapping[str, Any]], tp_size: int | None
) -> Iterator[Finding]:
    """Yields findings on speed.

    :param measured: the results of :func:`measure`, by rank.
    """
    for rank, each in measured.items():
        if "error" in each:
            yield Finding(
                "error",
                "speed",
                f"the collectives failed: {each['error']}",
                (rank,),
                "fix the other findings first; NCCL_DEBUG=INFO and TORCH_DISTRIBUTED_DEBUG=INFO "
                "log more",
            )
    if any("error" in each for each in measured.values()):
        return
    yield from _judge_work({rank: each["work"] for rank, each in measured.items()})
    yield from _describe("all ranks", measured[0]["world"], tuple(measured))
    if "links" in measured[0]:
        yield from _judge_links(job, {r: each["links"] for r, each in measured.items()})
    if "gang" in measured[0] and tp_size is not None:
        yield from _judge_gangs(job.size, tp_size, {r: e["gang"] for r, e in measured.items()})


def _time_collectives(gang: Gang) -> dict[str, list[float]]:
    """Returns the seconds of each run, by operation and size, as ``"all_reduce 4096"``."""
    return {
        f"{operation} {nbytes}": _time(gang, _collective(gang, operation, nbytes))
        for operation in OPERATIONS
        for nbytes in SIZES
    }


def _collective(gang: Gang, operation: str, nbytes: int) -> Callable[[], None]:
    columns = max(nbytes // 4 // gang.size, 1)
    whole = torch.ones(gang.size, columns, device=gang.device)
    piece = torch.ones(columns, device=gang.device)
    other = torch.empty_like(whole)
    calls: dict[str, Callable[[], None]] = {
        "all_gather": lambda: gang.all_gather(other, piece),
        # A sum would overflow.
        "all_reduce": lambda: gang.all_reduce(whole, ReduceOperation.MAX),
        "reduce_scatter": lambda: gang.reduce_scatter(piece, whole),
        "all_to_all": lambda: gang.all_to_all(other, whole),
    }
    return calls[operation]


def _time(gang: Gang, call: Callable[[], None]) -> list[float]:
    _time_once(gang, call)  # The first run connects.
    took = torch.tensor([_time_once(gang, call)], device=gang.device, dtype=torch.float64)
    gang.all_reduce(took, ReduceOperation.MAX)
    count = min(max(int(_SECONDS / took.item()), 3), 30)
    return [_time_once(gang, call) for _ in range(count)]


def _time_once(gang: Gang, call: Callable[[], None]) -> float:
    gang.barrier()
    _synchronize(gang.device)
    began = time.perf_counter()
    call()
    _synchronize(gang.device)
    return time.perf_counter() - began


def _time_links(gang: Gang) -> dict[str, float]:
    """Times sending 1 MiB from each rank to the next, while others are idle. Returns seconds by
    sender, on the receiver."""
    found = {}
    count = min(gang.size, _MOST_LINKS) if gang.size > 2 else 1
    for sender in range(count):
        receiver = (sender + 1) % gang.size
        sent, received = [0] * gang.size, [0] * gang.size
        if gang.rank == sender:
            sent[receiver] = _LINK_BYTES
        if gang.rank == receiver:
            received[sender] = _LINK_BYTES
        send = partial(
            gang.all_to_all,
            torch.empty(sum(received), dtype=torch.uint8, device=gang.device),
            torch.ones(sum(sent), dtype=torch.uint8, device=gang.device),
            received,
            sent,
        )
        times = [_time_once(gang, send) for _ in range(6)][1:]
        if gang.rank == receiver:
            found[str(sender)] = median(times)
    return found


def _time_work(device: torch.device) -> float:
    """Times a matrix multiplication, which needs no other rank."""
    size = 4096 if device.type == "cuda" else 384
    a = torch.ones(size, size, device=device)
    times = []
    for _ in range(10):
        _synchronize(device)
        began = time.perf_counter()
        a @ a
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)  # The minimum is the least disturbed by other processes.


def _judge_work(work: Mapping[int, float]) -> Iterator[Finding]:
    for rank, usual in outliers(work):
        yield Finding(
            "warning",
            "speed",
            f"the rank computes {work[rank] / usual:.1f} times slower than others",
            (rank,),
            "check for other processes on its cores or device, and its temperature",
        )


def _judge_links(job: Job, links: Mapping[int, Mapping[str, float]]) -> Iterator[Finding]:
    seconds = {
        (int(sender), receiver): each
        for receiver, found in links.items()
        for sender, each in found.items()
    }

    def is_inside(link: tuple[int, int]) -> bool:
        return job.node_of[link[0]] == job.node_of[link[1]]

    for where, inside in (("in a node", True), ("between nodes", False)):
        alike = {link: each for link, each in seconds.items() if is_inside(link) == inside}
        if not alike:
            continue
        for (sender, receiver), usual in outliers(alike):
            took = alike[sender, receiver]
            yield Finding(
                "warning",
                "speed",
                f"1 MiB from rank {sender} to rank {receiver} takes {took * 1e6:.0f} us, and "
                f"{usual * 1e6:.0f} over other links {where}",
                (sender, receiver),
                "check the link between them (`nvidia-smi topo -m`, `ethtool`)",
            )
        bandwidths = [_LINK_BYTES / each / 1e9 for each in alike.values()]
        what = f"neighbours {where} send {spread(bandwidths)} GB/s"
        yield Finding("ok", "speed", what, tuple(sorted({r for link in alike for r in link})))


def _judge_gangs(
    size: int, tp_size: int, measured: Mapping[int, Mapping[str, list[float]]]
) -> Iterator[Finding]:
    gangs = gangs_of(size, tp_size)
    largest = f"all_gather {SIZES[-1]}"
    # The minimum is the least disturbed by other processes.
    took = {first: min(measured[first][largest]) for first, *_ in gangs}
    for first, usual in outliers(took):
        yield Finding(
            "warning",
            "speed",
            f"the gang takes {took[first] / usual:.1f} times longer than others for an all-gather",
            tuple(range(first, first + tp_size)),
            "check the links between its ranks",
        )
    slowest = gangs[max(took, key=lambda first: took[first]) // tp_size]
    title = "the slowest gang" if len(gangs) > 1 else "the gang"
    yield from _describe(title, measured[slowest[0]], tuple(slowest))


def _describe(
    title: str, runs: Mapping[str, Sequence[float]], ranks: tuple[int, ...]
) -> Iterator[Finding]:
    """Yields a finding per operation: latency at the smallest size, GB/s at larger ones."""
    for operation in OPERATIONS:
        latency = [1e6 * each for each in runs[f"{operation} {SIZES[0]}"]]
        parts = [f"{SIZES[0] // 2**10} KiB {spread(latency)} us"]
        for nbytes in SIZES[1:]:
            speeds = [nbytes / each / 1e9 for each in runs[f"{operation} {nbytes}"]]
            parts.append(f"{nbytes // 2**20} MiB {spread(speeds)} GB/s")
        yield Finding("ok", "speed", f"{operation} of {title}: {', '.join(parts)}", ranks)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
