"""One end of a connection between a member and the hub."""

from __future__ import annotations

import errno
import fcntl
import json
import socket
import struct
import sys
import termios
import time
from typing import Any

Message = dict[str, Any]

_LONGEST = 1 << 20  # Bytes of a message.
_UNREACHABLE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}


class Lost(Exception):  # noqa: N818 (the message says what happened to the other end)
    """The connection has ended. The message is a predicate of the process on the other end."""


class Link:
    """Sends and receives messages, one line of JSON each, and tracks when the other end last sent.
    An empty line is a heartbeat."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._received = b""
        self._heard = time.monotonic()

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def send(self, message: Message | None = None) -> None:
        """Sends a message, or a heartbeat.

        :raises Lost: the connection has ended.
        """
        line = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        try:
            if self._connection.send(line) == len(line):
                return
        except BlockingIOError:
            pass
        except OSError as e:
            raise _lost(e) from None
        raise Lost("takes no more messages")

    def receive(self) -> list[Message]:
        """Returns the messages that have arrived.

        :raises Lost: the connection has ended.
        """
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as e:
            raise _lost(e) from None
        if not data:
            raise Lost("died: its connection was closed")
        self._heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines if line]
        except ValueError:
            messages = [None]
        if len(self._received) > _LONGEST or not all(isinstance(m, dict) for m in messages):
            raise Lost("sent an invalid message")
        return messages

    def silence(self) -> float:
        """Returns the seconds since the last receipt."""
        return time.monotonic() - self._heard

    def why_silent(self) -> str:
        """Tells a stopped process from an unreachable host: a kernel acknowledges data even while
        the receiving process doesn't run."""
        text = f"has not been heard from for {self.silence():.1f} s"
        if not sys.platform.startswith("linux"):
            return text
        pending = fcntl.ioctl(self, termios.TIOCOUTQ, struct.pack("i", 0))  # SIOCOUTQ: not acked.
        if struct.unpack("i", pending)[0]:
            return f"{text}, and nor has its host: the host is down, or cut off"
        return f"{text}, but its host answers: the process is stopped, or lets no thread run"


def _lost(error: OSError) -> Lost:
    if error.errno in _UNREACHABLE:
        return Lost(f"can't be reached: {error.strerror}")
    return Lost("died: its connection was closed")
