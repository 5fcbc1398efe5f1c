"""Probes every pair of nodes over sockets: reachability, speed, and clocks."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from threading import Thread
from typing import Any

from .findings import Finding, outliers, spread
from .job import Job
from .meeting import Meeting
from .network import address_of

_PINGS = 10
_NBYTES = 4 * 2**20
_SENDINGS = 4  # The first ones let TCP's window grow.
_SKEW = 1.0  # Seconds.


def probe(meeting: Meeting, job: Job) -> dict[int, Any]:
    """Probes every other node from the first rank of each node. Returns the results by rank.

    All ranks must call it.
    """
    rank = meeting.rank
    leaders = [ranks[0] for ranks in job.nodes.values()]
    timeout = min(5.0, meeting.timeout)
    listener = None
    if rank in leaders and len(leaders) > 1:
        listener = _listen(address_of(job.facts[rank]["network"]))
    try:
        addresses = meeting.share(listener and [*listener.getsockname()])
        found: dict[str, Any] = {}
        if rank in leaders:
            order = [leader for leader in leaders if addresses.get(leader)]
            # In each turn, a node probes one other, and is probed by one. Stops before rank 0's
            # wait ends, if many do not answer.
            mine = order.index(rank) if rank in order else 0
            end = time.monotonic() + meeting.timeout / 2
            for turn in range(1, len(order)):
                other = order[(mine + turn) % len(order)]
                if time.monotonic() < end:
                    found[str(other)] = _ask(addresses[other], timeout)
        return meeting.share(found)
    finally:
        if listener:
            listener.shutdown(socket.SHUT_RDWR)  # Wakes the serving thread.
            listener.close()


def judge(job: Job, probes: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    """Yields findings on connections and clocks.

    :param probes: the results of :func:`probe`.
    """
    pairs = {
        (rank, int(other)): answer
        for rank, answers in probes.items()
        for other, answer in answers.items()
    }
    good = {pair: answer for pair, answer in pairs.items() if "error" not in answer}
    for (rank, other), answer in pairs.items():
        if "error" in answer:
            host, port = answer["address"]
            yield Finding(
                "error",
                "network",
                f"{job.node_of[rank]} cannot reach {job.node_of[other]} at {host}:{port}: "
                f"{answer['error']}",
                (rank, other),
                "open all ports between the nodes, and use an interface that both have "
                "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
            )
    yield from _judge_clocks(job, good)
    if not good:
        return
    latency = {pair: answer["s"] for pair, answer in good.items()}
    speed = {pair: answer["bytes_per_s"] for pair, answer in good.items()}
    for (rank, other), usual in outliers({pair: 1 / each for pair, each in speed.items()}):
        yield Finding(
            "warning",
            "network",
            f"{job.node_of[rank]} sends {speed[rank, other] / 1e9:.2f} GB/s to "
            f"{job.node_of[other]}, other pairs {1 / usual / 1e9:.2f}",
            (rank, other),
            "check the links of these nodes (`ethtool`), and other jobs on them",
        )
    yield Finding(
        "ok",
        "network",
        f"nodes reach each other: {spread([1e6 * s for s in latency.values()])} us round trip, "
        f"{spread([s / 1e9 for s in speed.values()])} GB/s over one socket",
        tuple(sorted({pair[0] for pair in good})),
    )


def _judge_clocks(job: Job, good: Mapping[tuple[int, int], Any]) -> Iterator[Finding]:
    skews = {pair[1]: answer["skew"] for pair, answer in good.items() if pair[0] == 0}
    for other, skew in skews.items():
        if abs(skew) > _SKEW:
            yield Finding(
                "warning",
                "clocks",
                f"the clock of {job.node_of[other]} is {abs(skew):.1f} s "
                f"{'ahead of' if skew > 0 else 'behind'} {job.node_of[0]}'s",
                (other,),
                "start NTP there; times in logs and of files are inconsistent",
            )
    if skews and max(map(abs, skews.values())) <= _SKEW:
        worst = max(map(abs, skews.values()))
        yield Finding("ok", "clocks", f"clocks differ by up to {worst * 1e3:.1f} ms", (0, *skews))


def _listen(address: str | None) -> socket.socket:
    listener = socket.socket()
    try:
        listener.bind((address or "", 0))
    except OSError:
        # Not an address of this node. The others will find that they cannot reach it there.
        listener.bind(("", 0))
    listener.listen(64)
    Thread(target=_serve, args=(listener,), daemon=True).start()
    return listener


def _serve(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # The listener was closed.
        Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(10)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(_PINGS):
                _receive(connection, 1)
                connection.sendall(struct.pack("!d", time.time()))
            for _ in range(_SENDINGS):
                _receive(connection, _NBYTES)
                connection.sendall(b"!")
        except OSError:
            pass  # The client sees it too.


def _ask(address: Sequence[Any], timeout: float) -> dict[str, Any]:
    try:
        with socket.create_connection((address[0], address[1]), timeout) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            best, skew = float("inf"), 0.0
            for _ in range(_PINGS):
                began = time.time()
                connection.sendall(b"?")
                (theirs,) = struct.unpack("!d", _receive(connection, 8))
                took = time.time() - began
                if took < best:
                    # As in NTP: assume that they read the clock halfway through the round trip.
                    best, skew = took, theirs - (began + took / 2)
            data, speed = bytes(_NBYTES), 0.0
            for _ in range(_SENDINGS):
                start = time.perf_counter()
                connection.sendall(data)
                _receive(connection, 1)
                speed = max(speed, _NBYTES / (time.perf_counter() - start))
    except TimeoutError:
        return {"error": f"no answer for {timeout:.0f} s", "address": address}
    except OSError as e:
        return {"error": f"{e.strerror or e}", "address": address}
    return {"s": max(best, 1e-9), "skew": skew, "bytes_per_s": speed}


def _receive(connection: socket.socket, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    rest = memoryview(data)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionResetError("the connection was closed")
        rest = rest[count:]
    return data
