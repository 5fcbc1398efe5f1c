"""Exchanges values between ranks over a store, where every wait has a timeout.

It doesn't initialise torch.distributed, so it works even if the process group would not, and rank 0
learns which ranks are missing.
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

_LAST_WORDS = 10.0  # Seconds for the other ranks to read rank 0's last message.


class Meeting:
    """One rank's end of the exchange between the ranks of a job.

    :param place: the place of this process, with the address of rank 0.
    :param timeout: seconds that rank 0 waits for the others in each exchange.
    :raises MeetingError: the store cannot be created or reached.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.rank = place.rank
        self.size = place.size
        self.present = list(range(place.size))
        self.timeout = timeout
        self._count = 0
        store = open_store(place, timeout) if place.size > 1 else HashStore()
        # Agents of torchrun keep their store when they restart the ranks.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"tp_embed.doctor/{attempt}", store)
        self.own_seat = self.store.add(f"seat/{self.rank}", 1)

    def gather(self, value: Any) -> dict[int, Any]:
        """Returns the values of all ranks that answer in time, on rank 0; nothing on the others.

        Drops late ranks from all later exchanges.
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
        """Broadcasts the value of rank 0.

        :raises MeetingError: rank 0 did not send it in time.
        """
        self._count += 1
        key = f"{self._count}/told"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        try:
            # Rank 0 may have started later, and may have waited for another rank.
            self.store.wait([key], timedelta(seconds=2 * self.timeout + 5))
            return json.loads(self.store.get(key))
        except RuntimeError as e:
            raise _lost() from e

    def share(self, value: Any) -> dict[int, Any]:
        """Returns the values of all ranks that answer in time, on all of these ranks.

        :raises MeetingError: this rank was too late, or rank 0 does not answer.
        """
        answers: dict[int, Any] = dict(self.tell(list(self.gather(value).items())))
        self.present = list(answers)
        if self.rank not in answers:
            raise MeetingError(
                f"rank {self.rank} was too late: rank 0 waited for {self.timeout:.0f} s",
                "start all ranks at once, or raise `--timeout`",
            )
        return answers

    def seats(self, rank: int) -> int:
        """Returns the number of processes that connected as ``rank``."""
        return self.store.add(f"seat/{rank}", 0)

    def end(self) -> None:
        """Ends the exchange. Rank 0, which may host the store, leaves last."""
        if self.rank:
            with suppress(RuntimeError):  # Rank 0 has ended already.
                self.store.set(f"gone/{self.rank}", "")
            return
        keys = [f"gone/{rank}" for rank in self.present if rank]
        # Ranks that time out here are reported by their launcher.
        with suppress(RuntimeError):
            if keys:
                self.store.wait(keys, timedelta(seconds=min(_LAST_WORDS, self.timeout)))


def _lost() -> MeetingError:
    return MeetingError("rank 0 stopped answering", "check its output")
