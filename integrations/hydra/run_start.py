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

from tp_embed.launch.environment import Place, find_place

RUN_ID = "TP_EMBED_RUN_ID"
_KEY = "tp_embed/run_start"
_TIMEOUT = timedelta(minutes=5)
_servers: list[Any] = []  # That of this process, while others may connect to it.


@dataclass(frozen=True)
class RunStart:
    """``time`` is that of rank 0's clock and zone; ``id`` is the variable ``TP_EMBED_RUN_ID`` of
    rank 0, or else made of the time and a few random digits. Both stay when torchrun starts the
    ranks again."""

    time: datetime
    id: str


@functools.cache
def run_start() -> RunStart:
    """That of the run of this process. It is agreed on once, when all ranks have called this; all
    jobs of a sweep that run in this process have the same.

    :raises GangError: not all ranks were there in time, or nobody has said where rank 0 is.
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
    from tp_embed.gang import GangError
    from tp_embed.launch.rendezvous import MeetingError, open_store

    # The server of torchrun's ranks is a process of torchrun, and may outlive them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    here = [f"{_KEY}/{attempt}/{rank}" for rank in range(place.size)]
    missing = [place.rank]
    try:
        store = open_store(place, _TIMEOUT.total_seconds())
        if place.rank == 0:
            _servers.append(store)
            text = json.dumps([own.time.isoformat(), own.id])
            text = store.compare_set(_KEY, "", text).decode()  # What is there already, stays.
            store.set(here[0], "")
            try:
                store.wait(here, _TIMEOUT)
            except RuntimeError:
                missing = [rank for rank, key in enumerate(here) if not store.check([key])]
                raise
        else:
            text = store.get(_KEY).decode()
            store.set(here[place.rank], "")
    except RuntimeError as e:
        who = f"Rank {missing[0]}" if len(missing) == 1 else f"Ranks {missing}"
        what, fix = str(e), getattr(e, "fix", "see whether all nodes have started the job")
        if not isinstance(e, MeetingError):
            where = f"{place.master_addr}:{place.master_port}"
            what = f"did not in {_TIMEOUT.total_seconds():.0f} s at {where}: {what}"
        raise GangError(
            f"{who} must meet the others to agree on the directory of the run, but {what}. "
            f"Fix: {fix}."
        ) from e
    time, run_id = json.loads(text)
    return RunStart(datetime.fromisoformat(time), run_id)
