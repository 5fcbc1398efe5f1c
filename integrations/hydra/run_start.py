"""When a run started and what its id is, the same on all ranks of all nodes.

Clocks differ, and ranks start one after the other. So rank 0 says it to the others, through a store
of torch.distributed at the address where the ranks are going to meet anyway. That works before
torch.distributed is initialised, which is when Hydra makes a directory that is named so.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tp_embed.launcher import Place, find_place

RUN_ID = "TP_EMBED_RUN_ID"
_KEY = "tp_embed/run_start"
_TIMEOUT = timedelta(minutes=5)
_servers: list[Any] = []  # That of this process, while others may connect to it.


@dataclass(frozen=True)
class RunStart:
    """``time`` is that of rank 0's clock and zone; ``id`` is the variable ``TP_EMBED_RUN_ID`` of
    rank 0, or else made of the time and a few random digits."""

    time: datetime
    id: str


@functools.cache
def run_start() -> RunStart:
    """That of the run of this process. It is agreed on once, when all ranks have called this; all
    jobs of a sweep that run in this process have the same.

    :raises ValueError: the launcher did not say where rank 0 is.
    :raises GangError: not all ranks were there in time.
    """
    place = find_place()
    time = datetime.now()
    random_id = f"{time:%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"
    own = RunStart(time, os.environ.get(RUN_ID) or random_id)
    return own if place.size == 1 else _agree(place, own)


def close_server() -> None:
    """Lets go of the server that rank 0 has started, which torch.distributed uses too while it is
    there. Later it would find there what an earlier process group has left."""
    _servers.clear()


def _agree(place: Place, own: RunStart) -> RunStart:
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    from tp_embed.gang import GangError

    if place.master_addr is None or place.master_port is None:
        raise ValueError(
            "`MASTER_ADDR` and `MASTER_PORT` must be where rank 0 listens, but are "
            f"{place.master_addr} and {place.master_port} instead. Start the ranks by a launcher, "
            "or set both."
        )
    here = [f"{_KEY}/{rank}" for rank in range(place.size)]
    who = f"Rank {place.rank}"
    try:
        store = TCPStore(
            place.master_addr,
            place.master_port,
            # The server of torchrun's ranks is a process of torchrun.
            is_master=place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,  # torch.distributed is going to listen at the same port.
        )
        if place.rank == 0:
            _servers.append(store)
            store.set(_KEY, json.dumps([own.time.isoformat(), own.id]))
            store.set(here[0], "")
            try:
                store.wait(here, _TIMEOUT)
            except DistError:
                who = f"Ranks {[rank for rank, key in enumerate(here) if not store.check([key])]}"
                raise
            return own
        time, run_id = json.loads(store.get(_KEY))
        store.set(here[place.rank], "")
    except (DistError, RuntimeError) as e:
        raise GangError(
            f"{who} must reach rank 0 at {place.master_addr}:{place.master_port} to agree on the "
            f"directory of the run, but did not in {_TIMEOUT.total_seconds():.0f} s: {e} See "
            "whether all nodes have started. To the launcher, or as `MASTER_ADDR`, give an address "
            "of the node of rank 0 that all nodes reach."
        ) from e
    return RunStart(datetime.fromisoformat(time), run_id)
