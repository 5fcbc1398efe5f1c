"""One end of a connection between processes that watch over each other."""

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


class Lost(Exception):  # noqa: N818 (it says what has happened to the other end)
    """The connection has ended; says how, of the process on the other end."""


class Link:
    """Sends and receives messages, a line of JSON each, and knows when the other end was last heard
    of. An empty line is a sign of life."""

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
        """Sends a message, or a sign of life.

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
        """The messages that have come.

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
            raise Lost("sends what is not a message")
        return messages

    def silence(self) -> float:
        """For how many seconds nothing has come."""
        return time.monotonic() - self._heard

    def why_silent(self) -> str:
        """What can be told about the other end from here. A kernel acknowledges what is sent to a
        process also while that process does not run."""
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
