"""The watchdog of one process."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, NoReturn

import torch.distributed as dist

from tp_embed._torch_private import default_store
from tp_embed.gang import GangError

from .deadline import Deadline
from .hub import GRACE, Hub
from .in_flight import Patience, Place, find_place, is_of_collective, stacks
from .link import Link, Lost

EXIT_CODE: Final = 75  # EX_TEMPFAIL of sysexits.h: try again later.
_LAST_WORDS = 5.0  # Seconds to write the last messages.
_PATIENCE = 1.0  # Seconds to hear of a dead rank, after a collective with it has failed.

_log = logging.getLogger(__name__)


class Watchdog:
    """Ends this process if another rank of the job is missing; see :func:`watch`."""

    _running: Watchdog | None = None
    _started = 0

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._beat = min(2.0, timeout / 10)
        self._process = os.getpid()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._name = f"rank {self._rank} on {socket.gethostname()} (pid {self._process})"
        self._leaving = False
        self._trouble = ""
        self._error: BaseException | None = None
        self._hub, self._link, self._hub_name = self._connect()
        self._deadline = Deadline()
        self._threads = [threading.Thread(target=self._run, name="watchdog", daemon=True)]
        if self._hub is not None:
            self._threads.append(
                threading.Thread(target=self._hub.run, name="watchdog hub", daemon=True)
            )
        self._except_hook = sys.excepthook
        sys.excepthook = self._on_exception
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    @classmethod
    def start(cls, timeout: timedelta | float) -> Watchdog:
        """Watches this process until it ends, or :meth:`stop` is called. All ranks must call it. A
        process has one watchdog; a second call with the same timeout returns the first.

        :raises ValueError: ``timeout`` is less than a second, or differs from the running
            watchdog's.
        :raises GangError: torch.distributed is not initialised.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        if not seconds >= 1:
            raise ValueError(f"`timeout` must be at least 1 second, but is {seconds:g} instead.")
        if not dist.is_initialized():
            raise GangError(
                "torch.distributed must be initialised before the watchdog starts. Call "
                "`torch.distributed.init_process_group()` or `deepspeed.init_distributed()`."
            )
        if cls._running is None:
            cls._running = cls(seconds)
        elif cls._running.timeout != seconds:
            raise ValueError(
                f"`timeout` must be {cls._running.timeout:g} seconds, as for the watchdog that "
                f"runs in this process, but is {seconds:g} instead. Call its `stop()` first."
            )
        return cls._running

    @classmethod
    def report(cls, error: BaseException) -> None:
        """Prints the traceback of ``error`` and ends all ranks, if a watchdog runs. For frameworks
        that catch errors and end the process themselves, as Hydra does; uncaught errors need no
        call."""
        if cls._running is not None:
            sys.excepthook(type(error), error, error.__traceback__)

    def stop(self) -> None:
        """Leaves the job without being reported missing. On rank 0, waits until all ranks left."""
        if self._process != os.getpid() or self._leaving:
            return
        self._leaving = True
        with suppress(Lost):
            self._link.send({"leaves": True})
        for thread in self._threads:
            thread.join()
        self._deadline.postpone(0)
        self._close()
        atexit.unregister(self.stop)
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._except_hook
        Watchdog._running = None

    def _fail(self, error: BaseException) -> None:
        """Tells all ranks that this one has failed, and waits for the end of this process."""
        self._error = error
        if is_of_collective(error):
            self._threads[0].join(_PATIENCE)  # The news of a dead rank may arrive in a moment.
        what = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        with suppress(Lost):
            self._link.send({"failed": what})
        self._threads[0].join(self.timeout)

    def _connect(self) -> tuple[Hub | None, Link, str]:
        """Connects to the hub of rank 0, which publishes its address in the store."""
        store, key = default_store(), f"tp_embed/watchdog/{Watchdog._started}"
        Watchdog._started += 1
        hub = None
        if self._rank == 0:
            token = secrets.token_hex()
            hub = Hub(self._size, self.timeout, self._beat, token)
            store.set(key, f"{socket.gethostname()} {hub.port} {token}")
        host, port, token = store.get(key).decode().split()
        # The launcher knows how to reach rank 0; its host name may resolve to another address.
        address = "localhost" if self._rank == 0 else os.environ.get("MASTER_ADDR", host)
        try:
            link = Link(socket.create_connection((address, int(port)), self.timeout))
        except OSError as e:
            raise GangError(
                f"{self._name} can't connect to the watchdog of rank 0, port {port} of {address}: "
                f"{e}. The nodes must reach each other at all ports, as for gloo and NCCL."
            ) from e
        link.send({"rank": self._rank, "name": self._name, "token": token})
        return hub, link, f"rank 0 on {host}"

    def _run(self) -> None:
        """Sends heartbeats, and handles messages of the hub, until the end."""
        # Longer than it takes to find a stopped rank, which is the better diagnosis.
        patience = Patience(self.timeout + 2 * self._beat)
        selector, next_beat = selectors.DefaultSelector(), time.monotonic()
        selector.register(self._link, selectors.EVENT_READ)
        try:
            while True:
                if selector.select(max(next_beat - time.monotonic(), 0)):
                    for message in self._link.receive():
                        if message.get("bye"):
                            return
                        self._handle(message)
                now = time.monotonic()
                if now < next_beat:
                    continue
                next_beat = now + self._beat
                if not self._trouble:
                    self._deadline.postpone(self.timeout + 3 * self._beat)
                self._link.send()
                if self._link.silence() > self.timeout:
                    raise Lost(self._link.why_silent())
                if patience.is_over():
                    self._link.send({"waits": find_place(self._error).text})
        except Lost as e:
            if self._trouble:
                self._end(self._trouble)
            if not self._leaving:
                self._end(f"missing: rank 0\n  {self._hub_name}, which hears of all ranks, {e}")
        except Exception:
            if not self._trouble:  # A bug of the watchdog must not kill the job.
                self._deadline.postpone(0)
            raise

    def _handle(self, message: dict[str, Any]) -> None:
        if "verdict" in message:
            self._end(message["verdict"])
        if "trouble" in message:
            self._trouble = message["trouble"]
            self._deadline.postpone(GRACE + _LAST_WORDS)
            place = find_place(self._error)
            self._link.send({"place": place.text, "gang": place.gang})
            # Don't wait for the verdict: the launcher may end this process before.
            self._report(self._trouble, place)

    def _on_exception(self, kind: Any, error: BaseException, trace: Any) -> None:
        self._except_hook(kind, error, trace)
        if self._process == os.getpid():
            self._fail(error)

    def _end(self, verdict: str) -> NoReturn:
        """Ends this process, whatever its other threads are doing."""
        self._deadline.postpone(_LAST_WORDS)
        if not self._trouble:
            self._report(verdict, find_place(self._error))
        elif self._hub is not None:  # One copy is enough on the terminal of the job.
            self._write(verdict)
        self._write(f"{self._name} ends with exit code {EXIT_CODE}")
        if _log.hasHandlers():
            _log.critical("%s\n%s %s", verdict, self._name, find_place(self._error).text)
        os._exit(EXIT_CODE)

    def _report(self, what: str, place: Place) -> None:
        self._write(f"{what}\n  Here: {self._name} {place.text}.\n{stacks()}")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            os.write(2, f"[tp_embed watchdog] {text}\n".encode())

    def _close(self) -> None:
        self._link.close()
        if self._hub is not None:
            self._hub.close()


@contextmanager
def watch(timeout: timedelta | float) -> Iterator[Watchdog]:
    """In this context, all ranks of the job end if one of them dies, is stopped, hangs or is
    disconnected. All ranks must enter it, after torch.distributed is initialised::

        with watch(timeout=60):
            train()

    A process that dies, or leaves the context by an exception, is noticed at once. A process that
    sends no heartbeat for ``timeout``, or keeps others waiting in a collective for that long, is
    missing too. Then every rank writes to stderr who is missing, the collective and gang it waits
    in itself, and its stacks, and ends with exit code 75, which makes the launcher end its node.
    The kernel kills a stopped process; a rank that is disconnected from rank 0 ends itself.

    Rank 0 leaves the context after all others.

    :param timeout: seconds, or a ``timedelta``. Must exceed the longest wait between ranks in a
        healthy job, such as for rank 0 to write a file.
    :raises ValueError: ``timeout`` is less than a second, or differs from the running watchdog's.
    :raises GangError: torch.distributed is not initialised, or rank 0 cannot be reached.
    """
    watchdog = Watchdog.start(timeout)
    try:
        yield watchdog
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            watchdog.stop()
        else:
            Watchdog.report(e)
        raise
    watchdog.stop()


def _close_in_child() -> None:
    """Closes sockets in a forked process, so that connections end when its parent dies."""
    if Watchdog._running is not None:
        Watchdog._running._close()


os.register_at_fork(after_in_child=_close_in_child)
