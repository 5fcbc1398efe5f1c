"""Measures the collectives of gangs: calls, bytes and seconds, by operation."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn import Module

from tp_embed.gang import Gang
from tp_embed.nn.embedding import RowWiseEmbedding
from tp_embed.nn.gang_layer import GangLayer


@dataclass
class OperationTraffic:
    """Calls of one collective, the bytes this rank sent, and the seconds they took, including the
    wait for other ranks."""

    calls: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0


class Traffic:
    """Counts the collectives of ``gangs`` until it is closed::

        with Traffic(gang) as traffic:
            model(ids)
        print(traffic.by_operation())

    On a CPU, the time is wall time. On an accelerator, it is measured by events on the stream, and
    nothing waits for the device until the results are read. Collectives captured into a graph count
    once, without time. Bytes sent by one rank follow the docstrings of :class:`Gang`. Broadcasts of
    objects and barriers count as calls only.

    A gang shared by two models counts for both.
    """

    def __init__(self, *gangs: Gang) -> None:
        self._traffic: defaultdict[str, OperationTraffic] = defaultdict(OperationTraffic)
        self._running: deque[tuple[str, torch.Event, torch.Event]] = deque()
        self._handles = [
            gang.register_collective_hook(partial(self._count, gang))
            for gang in {id(gang): gang for gang in gangs}.values()
        ]

    def by_operation(self) -> dict[str, OperationTraffic]:
        """Returns the counts so far, by operation: ``"all_gather"``, ... Waits for collectives that
        still run on an accelerator."""
        self._collect(wait=True)
        return {name: self._traffic[name] for name in sorted(self._traffic)}

    def total(self) -> OperationTraffic:
        """Returns the sum over all operations. Waits like :meth:`by_operation`."""
        every = self.by_operation().values()
        return OperationTraffic(
            sum(t.calls for t in every),
            sum(t.bytes_sent for t in every),
            sum(t.seconds for t in every),
        )

    def close(self) -> None:
        """Stops counting. Keeps the counts."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _count(self, gang: Gang, operation: str, tensors: Sequence[Tensor]) -> Iterator[None]:
        entry = self._traffic[operation]
        entry.calls += 1
        entry.bytes_sent += bytes_sent(operation, sum(t.nbytes for t in tensors), gang.size)
        if gang.device.type == "cpu":
            started = time.perf_counter()
            try:
                yield
            finally:
                entry.seconds += time.perf_counter() - started
        elif torch.accelerator.current_stream(gang.device).is_capturing():
            yield  # Events can't be queried during capture, and a replay calls no hooks.
        else:
            start, end = (torch.Event(gang.device, enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._running.append((operation, start, end))
            self._collect()

    def _collect(self, wait: bool = False) -> None:
        """Adds the time of completed collectives, in the order they began."""
        while self._running and (wait or self._running[0][2].query()):
            operation, start, end = self._running.popleft()
            end.synchronize()
            self._traffic[operation].seconds += start.elapsed_time(end) / 1000


def gangs_of(model: Module, *, sharing_ids: bool = False) -> list[Gang]:
    """Returns the gangs of the sharded layers of ``model``, without duplicates.

    :param sharing_ids: whether to leave out gangs of tables whose ranks have ids of their own.
    """
    layers = [module for module in model.modules() if isinstance(module, GangLayer)]
    if sharing_ids:
        layers = [layer for layer in layers if not isinstance(layer, RowWiseEmbedding)]
    return list({id(layer.gang): layer.gang for layer in layers}.values())


def bytes_sent(operation: str, num_bytes: int, size: int) -> int:
    """Returns the bytes that one of ``size`` ranks sends for a collective with an input of
    ``num_bytes``, by the docstrings of :class:`Gang`. A broadcast counts ``num_bytes``, which every
    rank but the last of a chain passes on.
    """
    if size == 1:
        return 0
    others = size - 1
    return {
        "all_reduce": 2 * others * num_bytes // size,
        "all_gather": others * num_bytes,
        "reduce_scatter": others * num_bytes // size,
        "all_to_all": num_bytes,
        "broadcast": num_bytes,
    }.get(operation, 0)
