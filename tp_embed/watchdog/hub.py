"""The server of the watchdog, on rank 0: collects heartbeats and broadcasts failures."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .link import Link, Lost, Message

GRACE = 3.0  # Seconds for ranks to report where they are, after the first failure.
_ARRIVAL = 60.0  # Seconds for ranks to connect, at least: some take longer to start.
_SHOWN = 16  # Lines of a verdict; a job may have thousands of ranks.


@dataclass
class _Member:
    """The state of a rank, as the hub knows it."""

    rank: int
    link: Link | None = None
    name: str = ""
    place: str = ""
    gang: list[int] = field(default_factory=list)
    trouble: str = ""
    waits: bool = False  # Its trouble is that it waits for others.
    left: bool = False
    mute: bool = False  # It sends no heartbeats.

    def __str__(self) -> str:
        return self.name or f"rank {self.rank}"


class Hub:
    """Accepts connections of the ranks 0 to ``size - 1``, and serves them in :meth:`run`.

    Sends every rank a heartbeat each ``beat`` seconds. Broadcasts the first failure at once; all
    ranks answer with where they are, get the verdict, and end.

    :param token: the secret that authenticates a rank.
    """

    def __init__(self, size: int, timeout: float, beat: float, token: str) -> None:
        self._timeout, self._beat, self._token = timeout, beat, token
        self._members = [_Member(rank) for rank in range(size)]
        self._owners: dict[Link, _Member] = {}
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(
            ("", 0), family=family, backlog=max(size, 128), dualstack_ipv6=dual
        )
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._begin = time.monotonic()
        self._troubled: list[_Member] = []
        self._ends: float | None = None  # When the verdict is due.

    @property
    def port(self) -> int:
        port: int = self._server.getsockname()[1]
        return port

    def run(self) -> None:
        """Serves until every rank has left, or the verdict is sent."""
        next_beat = time.monotonic()
        while not all(member.left for member in self._members):
            wake = next_beat if self._ends is None else min(next_beat, self._ends)
            for key, _ in self._selector.select(max(wake - time.monotonic(), 0)):
                self._serve(key)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._beat
                self._check_members()
            if self._ends is not None and (now >= self._ends or self._all_answered()):
                verdict = {"verdict": self._verdict()}
                for member in self._members:
                    self._send(member, verdict)
                return
        self._send(self._members[0], {"bye": True})

    def close(self) -> None:
        """Closes all connections. Safe in a forked process, too."""
        self._server.close()
        for member in self._members:
            if member.link is not None:
                member.link.close()

    def _serve(self, key: selectors.SelectorKey) -> None:
        link = key.data
        if link is None:
            try:
                link = Link(self._server.accept()[0])
            except BlockingIOError:  # The client has disconnected already.
                return
            except OSError:  # Too many open files, for now.
                time.sleep(min(self._beat, 0.1))
                return
            self._selector.register(link, selectors.EVENT_READ, link)
            return
        try:
            for message in link.receive():
                if link in self._owners:
                    self._handle(self._owners[link], message)
                else:
                    self._admit(link, message)
        except Lost as e:
            self._selector.unregister(link)
            link.close()
            if (member := self._owners.pop(link, None)) is not None:
                member.link = None
                if not member.left:
                    self._record_trouble(member, str(e))

    def _admit(self, link: Link, message: Message) -> None:
        rank: Any = message.get("rank")
        if message.get("token") != self._token or rank not in range(len(self._members)):
            raise Lost("is not a rank")
        member = self._members[rank]
        if member.name:
            raise Lost("claims a rank that is connected already")
        self._owners[link] = member
        member.link, member.name = link, str(message.get("name"))

    def _handle(self, member: _Member, message: Message) -> None:
        if "place" in message:
            member.place, member.gang = message["place"], message["gang"]
        elif "waits" in message:
            member.waits = True
            self._record_trouble(member, message["waits"])
        elif "failed" in message:
            self._record_trouble(member, f"has failed: {message['failed']}")
        elif message.get("leaves"):
            member.left = True
            if member.rank != 0:  # Rank 0 hosts this hub, and leaves last.
                self._send(member, {"bye": True})

    def _check_members(self) -> None:
        """Sends heartbeats, and finds ranks that send none."""
        arrival = max(self._timeout, _ARRIVAL)
        late = time.monotonic() - self._begin > arrival
        for member in self._members:
            self._send(member)
            if member.left:
                continue
            if member.link is None:
                if late:
                    self._record_trouble(member, f"has not connected within {arrival:g} s")
            elif member.link.silence() > self._timeout:
                member.mute = True
                self._record_trouble(member, member.link.why_silent())

    def _record_trouble(self, member: _Member, trouble: str) -> None:
        if member.trouble:
            return
        member.trouble = trouble
        self._troubled.append(member)
        if self._ends is None:
            self._ends = time.monotonic() + GRACE
            for other in self._members:
                self._send(other, {"trouble": f"{member} {trouble}"})

    def _send(self, member: _Member, message: Message | None = None) -> None:
        if member.link is not None:
            with suppress(Lost):  # Handled when the link is read.
                member.link.send(message)

    def _all_answered(self) -> bool:
        """Returns whether every rank that can answer has done so."""
        for member in self._members:
            can_answer = member.link is not None and not member.left and not member.mute
            if can_answer and not member.place:
                return False
        return True

    def _verdict(self) -> str:
        """Names the missing ranks, then where all others are; ranks that wait for the missing come
        first."""
        gone = [member for member in self._members if not member.place]
        missing = [member.rank for member in gone or self._members if not member.gang]
        lines = [f"{m} {m.trouble}" for m in self._troubled if not (m.waits and m.place)]
        for member in gone:
            if member.left:
                lines.append(f"{member} has left: it came to its end")
            elif not member.trouble:
                lines.append(f"{member} does not answer")
        places = []
        for member in self._members:
            if member.place:
                awaited = [rank for rank in missing if rank in member.gang]
                mark = f"; missing there: {_list(awaited)}" if awaited else ""
                places.append(f"{member} {member.place}{mark}")
        places.sort(key=lambda place: "; missing there" not in place)
        lines += places
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more lines"]
        head = f"missing: {_list(missing)}" if missing else "all ranks wait for each other"
        return "\n  ".join([head, *lines])


def _list(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
