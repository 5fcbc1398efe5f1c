"""Where the ranks meet: a store that rank 0 asks, and in which no rank waits for ever for another.

torch.distributed is not initialised for it: whatever is wrong with the process group, what the
ranks have seen still reaches rank 0, and so does who has not come.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from tp_embed._torch_private import HashStore, PrefixStore
from tp_embed.launch.environment import Place
from tp_embed.launch.rendezvous import MeetingError, open_store

_LAST_WORDS = 10.0  # Seconds that rank 0 gives the others to read its verdict.


class Meeting:
    """The meeting of the ranks of a job, seen from one of them.

    :param place: of this process; that of rank 0 has to be there.
    :param timeout: how many seconds rank 0 waits, each time, for ranks that do not answer.
    :raises MeetingError: the store cannot be made, or not be reached.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.rank = place.rank
        self.size = place.size
        self.present = list(range(place.size))
        self.timeout = timeout
        self._count = 0
        store = open_store(place, timeout) if place.size > 1 else HashStore()
        # Agents of torchrun keep their store when they start the ranks again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"tp_embed.doctor/{attempt}", store)
        self.own_seat = self.store.add(f"seat/{self.rank}", 1)

    def gather(self, value: Any) -> dict[int, Any]:
        """On rank 0 the values of all ranks that give one in time, and nothing on the others.

        Ranks that do not are not waited for again.
        """
        self._count += 1
        try:
            self.store.set(f"{self._count}/{self.rank}", json.dumps(value))
        except RuntimeError as e:
            raise _lost() from e
        if self.rank:
            return {}
        deadline = time.monotonic() + self.timeout
        answers: dict[int, Any] = {}
        for rank in self.present:
            left = max(deadline - time.monotonic(), 0.01)
            try:
                self.store.wait([f"{self._count}/{rank}"], timedelta(seconds=left))
            except RuntimeError:
                continue
            answers[rank] = json.loads(self.store.get(f"{self._count}/{rank}"))
        self.present = list(answers)
        return answers

    def tell(self, value: Any) -> Any:
        """The value of rank 0, on all ranks.

        :raises MeetingError: rank 0 has not told it in time.
        """
        self._count += 1
        key = f"{self._count}/told"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        try:
            # Rank 0 may have waited for another rank, and may have begun later.
            self.store.wait([key], timedelta(seconds=2 * self.timeout + 5))
            return json.loads(self.store.get(key))
        except RuntimeError as e:
            raise _lost() from e

    def share(self, value: Any) -> dict[int, Any]:
        """The values of all ranks that give one in time, on all of these.

        :raises MeetingError: this rank has not, or rank 0 does not answer.
        """
        answers: dict[int, Any] = dict(self.tell(list(self.gather(value).items())))
        self.present = list(answers)
        if self.rank not in answers:
            raise MeetingError(
                f"rank {self.rank} came too late: rank 0 had waited for {self.timeout:.0f} s",
                "start all ranks at once, or give more time with `--timeout`",
            )
        return answers

    def seats(self, rank: int) -> int:
        """How many processes have come as ``rank``."""
        return self.store.add(f"seat/{rank}", 0)

    def end(self) -> None:
        """Ends the meeting: rank 0, which may hold the store, is the last to go."""
        if self.rank:
            with suppress(RuntimeError):  # It is gone itself.
                self.store.set(f"gone/{self.rank}", "")
            return
        keys = [f"gone/{rank}" for rank in self.present if rank]
        # If some do not: they have been waited for, and their launcher says what became of them.
        with suppress(RuntimeError):
            if keys:
                self.store.wait(keys, timedelta(seconds=min(_LAST_WORDS, self.timeout)))


def _lost() -> MeetingError:
    return MeetingError("rank 0 does not answer any more", "look at what it says")
