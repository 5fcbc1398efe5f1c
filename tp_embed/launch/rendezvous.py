"""A store of torch.distributed for what ranks have to tell each other before it is initialised: at
the address where they are going to meet anyway, and with errors that say what is wrong there."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

from tp_embed._torch_private import Store, TCPStore
from tp_embed.launch.environment import Place


class MeetingError(RuntimeError):
    """This rank cannot meet the others.

    :param fix: what to do about it.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def open_store(place: Place, timeout: float) -> Store:
    """The store that rank 0 has, or a process of torchrun. As long as rank 0 holds it,
    torch.distributed uses its server too.

    :param timeout: how many seconds to wait for it, and then by default for its keys.
    :raises MeetingError: it cannot be made, or not be reached.
    """
    if place.master_addr is None or place.master_port is None:
        raise MeetingError(
            "nobody has said where rank 0 is",
            "set MASTER_ADDR and MASTER_PORT to an address of the node of rank 0 and a free port",
        )
    address, port = place.master_addr, place.master_port
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = place.rank == 0 and not of_agent
    if not is_master:
        try:
            _wait_for_door(address, port, timeout)
        except MeetingError as e:
            if place.local_size != place.size and (resolved := _loopback(address)):
                e.fix = (
                    f"{address} is this node itself ({resolved}); if rank 0 is on another, set the "
                    "master address to one of that node"
                )
            raise
    try:
        return TCPStore(
            address,
            port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as e:
        text = str(e)
        if is_master and "address already in use" in text:
            raise MeetingError(
                f"port {port} is taken by another process of this node",
                f"end it (`ss -ltnp 'sport = :{port}'` names it), or choose another master port",
            ) from e
        if is_master:
            raise MeetingError(
                f"rank 0 does not find itself at {address}:{port}: {text.splitlines()[0]}",
                "set the master address to an address of the node of rank 0",
            ) from e
        raise MeetingError(
            f"what answers at {address}:{port} is no store of rank 0: {text.splitlines()[0]}",
            "end what listens there, or choose another master port",
        ) from e


def _wait_for_door(address: str, port: int, timeout: float) -> None:
    """Waits until something listens where rank 0 is to be; torch's own error says less of why."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), max(deadline - time.monotonic(), 1)).close()
            return
        except socket.gaierror as e:
            error, fix = f"{e.strerror}", "use an address, or a name that this node knows"
        except OSError as e:
            error = "it does not answer" if isinstance(e, TimeoutError) else f"{e.strerror}"
            fix = (
                "see whether rank 0 runs there (it may have failed before), and whether a firewall "
                "is between"
            )
        if time.monotonic() >= deadline:
            raise MeetingError(
                f"rank 0 cannot be reached at {address}:{port} for {timeout:.0f} s: {error}",
                fix,
            )
        time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))


def _loopback(name: str) -> str | None:
    """The address that ``name`` stands for, if it is one of the loopback."""
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if address.startswith("127."):
            return address
    return None
