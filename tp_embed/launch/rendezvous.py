"""Opens a torch.distributed store before ``init_process_group()``, at the same address, with errors
that name the fault."""

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
    """Opens the store of rank 0, or of the torchrun agent. While rank 0 holds it, torch.distributed
    uses the same server.

    :param timeout: seconds to wait for the store, and by default for its keys.
    :raises MeetingError: the store cannot be created or reached.
    """
    if place.master_addr is None or place.master_port is None:
        raise MeetingError(
            "the address of rank 0 is unknown",
            "set MASTER_ADDR and MASTER_PORT to an address of the node of rank 0 and a free port",
        )
    address, port = place.master_addr, place.master_port
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = place.rank == 0 and not of_agent
    if not is_master:
        try:
            _wait_for_listener(address, port, timeout)
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
                f"rank 0 cannot reach itself at {address}:{port}: {text.splitlines()[0]}",
                "set the master address to an address of the node of rank 0",
            ) from e
        raise MeetingError(
            f"{address}:{port} answers, but not as a store of rank 0: {text.splitlines()[0]}",
            "end the process that listens there, or choose another master port",
        ) from e


def _wait_for_listener(address: str, port: int, timeout: float) -> None:
    """Waits until a process listens at the address of rank 0. Raises clearer errors than torch."""
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
    """Returns the address that ``name`` resolves to, if it is a loopback address."""
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if address.startswith("127."):
            return address
    return None
