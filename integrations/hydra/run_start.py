"""The start time and id of a run, the same on all ranks of all nodes.

Clocks differ, and ranks start one after the other. So rank 0 sends both to the others, through a
torch.distributed store at the address where the ranks will meet anyway. This works before
torch.distributed is initialized, when Hydra creates directories named by time or id.
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
_servers: list[Any] = []  # The server of this process, while others may connect to it.


@dataclass(frozen=True)
class RunStart:
    """``time`` is in rank 0's clock and time zone; ``id`` is rank 0's variable
    ``TP_EMBED_RUN_ID``, or else the time and a few random digits. Both survive restarts by
    torchrun."""

    time: datetime
    id: str


@functools.cache
def run_start() -> RunStart:
    """Returns the start of this process's run. The ranks agree on it once, when all have called
    this; all jobs of a sweep in this process share it.

    :raises GangError: a rank did not come in time, or the address of rank 0 is unknown.
    """
    place = find_place()
    time = datetime.now()
    random_id = f"{time:%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"
    own = RunStart(time, os.environ.get(RUN_ID) or random_id)
    return own if place.size == 1 else _agree(place, own)


def close_server() -> None:
    """Releases the server that rank 0 started. torch.distributed would reuse it, and find keys of
    an earlier process group."""
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
            text = store.compare_set(_KEY, "", text).decode()  # Keeps an existing value.
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
