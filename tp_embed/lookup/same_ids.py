"""Checks that all ranks of a gang look up the same ids.

In a sharded table, each rank fetches parts of the rows for *all* ranks. If ranks pass different
ids, they get wrong rows, without an error as long as the sizes match. The check compares checksums
before sending anything whose size depends on the ids.
"""

from __future__ import annotations

import os
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from tp_embed.gang import Gang, GangError
from tp_embed.gang.graph_ops import is_recorded
from tp_embed.lookup.ids import LateCheck, ToHost, is_capturing

VARIABLE = "TP_EMBED_CHECK_IDS"

# Measured: adds at most 0.66% to a lookup of 4096 ids or more, by median.
_INTERVAL = 128

# Each rank sends the number of the lookup, the table, the number of dimensions, the sizes, and
# checksums of the shapes so far, of these ids, and of the ids so far.
_SIZES = 8
_NUM_FACTS = 3 + _SIZES + 3

_PADDING = -1

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio.


def check_interval(check_ids: int | None) -> int:
    """Returns n to compare ids at the first lookup and each n-th after it, or 0 for never.

    :param check_ids: ``None``: n = 128. ``False``: never. ``True``: each lookup. Or n. The
        environment variable ``TP_EMBED_CHECK_IDS``, a number, takes precedence.
    :raises ValueError: ``check_ids`` or the environment variable has an invalid value.
    """
    is_interval = isinstance(check_ids, int) and check_ids >= 0
    if check_ids is not None and not is_interval:
        raise ValueError(
            "`check_ids` must be True (each lookup), False (none), or a number n (the first lookup "
            f"and each n-th after it), but is {check_ids!r} instead."
        )
    given = os.environ.get(VARIABLE)
    if given is None:
        return _INTERVAL if check_ids is None else int(check_ids)
    if not given.isascii() or not given.isdigit():
        raise ValueError(
            f"The environment variable {VARIABLE} must be 0 (never), 1 (each lookup), or a number "
            f"n (the first lookup and each n-th after it), but is {given!r} instead."
        )
    return int(given)


class SameIds(LateCheck):
    """Raises :class:`GangError` on all ranks of a gang if their lookups differ in the values,
    order, shape or padding of the ids, or in the table.

    Compares at the first lookup and each n-th after it; this depends only on the number of lookups,
    so that ranks agree. The next comparison covers the lookups in between, by a checksum over all.
    Does one all-gather, 112 (P-1) bytes. On an accelerator, waits for the first result, and reads
    the others two lookups later. Compares nothing during graph capture.

    :param every: n, or 0 to compare nothing.
    :param lag: see :class:`LateCheck`.
    """

    def __init__(self, every: int, lag: int | None = None) -> None:
        super().__init__(lag)
        self.every = every
        self._history = _History()

    def __call__(self, ids: Tensor, valid: Tensor | None, gang: Gang, where: str) -> None:
        """
        :param ids: *Shape:* any. *Dtype:* int32 or int64, which compare equal.
        :param valid: false at padding; ``None`` for no padding. *Shape:* as ``ids``.
        :param where: the name of the table, the same on every rank.
        :raises GangError: ids differ between ranks; raised on all ranks.
        """
        if not self.every or gang.size == 1 or ids.is_meta or is_recorded(ids):
            return
        if is_capturing(ids.device):
            return
        flat = (ids if valid is None else ids.masked_fill(~valid, _PADDING)).flatten()
        checksum = (flat * _weights(len(flat), ids.device)).sum()
        history = self._history
        history.add(ids.shape, checksum)
        lag = self.lag_on(ids.device) if history.count > 1 else 0
        if (since := (history.count - 1) % self.every) > 0:
            if since >= lag:
                self.flush()
            return
        shapes, all_ids = history.take()
        sizes = [*ids.shape[:_SIZES], *[0] * (_SIZES - ids.ndim)]
        numbers = [history.count, crc32(where.encode()), ids.ndim, *sizes, shapes]
        known = torch.tensor(numbers, device="cpu", dtype=torch.int64)
        if ids.device.type != "cpu":
            known = known.pin_memory().to(ids.device, non_blocking=True)
        facts = known.new_empty(gang.size, _NUM_FACTS)
        gang.all_gather(facts, torch.cat([known, torch.stack([checksum, all_ids])]))
        # If the result is late, mismatched lookups may be running, so don't send the ids for it.
        self._look(_Comparison(gang, where, ids.shape, facts, None if lag else flat), lag)


class _History:
    """Counts lookups, and keeps checksums of the ones since the last comparison."""

    def __init__(self) -> None:
        self.count = 0
        self._shapes = 0
        self._ids = torch.zeros((), dtype=torch.int64, device="cpu")

    def add(self, shape: torch.Size, checksum: Tensor) -> None:
        self.count += 1
        self._shapes = crc32(repr(tuple(shape)).encode(), self._shapes)
        self._ids = checksum + self._ids.to(checksum.device, non_blocking=True) * _ODD

    def take(self) -> tuple[int, Tensor]:
        """Returns the checksums of the shapes and the ids, and resets them."""
        taken = self._shapes, self._ids
        self._shapes, self._ids = 0, torch.zeros_like(self._ids)
        return taken


class _Comparison:
    """Compares what all ranks sent, once it is on the host.

    :param facts: a row for each rank. *Shape:* :math:`(P,14)`.
    :param ids: this rank's ids, with -1 for padding, or ``None`` if they must not be sent. *Shape:*
        :math:`(N)`.
    """

    def __init__(
        self, gang: Gang, where: str, shape: torch.Size, facts: Tensor, ids: Tensor | None
    ) -> None:
        self._gang, self._where, self._shape, self._ids = gang, where, shape, ids
        self._facts = ToHost(facts)

    def report(self) -> None:
        """
        :raises GangError: ranks differ.
        """
        facts: list[list[int]] = self._facts.read()
        others = [rank for rank, own in enumerate(facts) if own != facts[0]]
        if not others:
            return
        numbers, tables, checksums = ([own[i] for own in facts] for i in (0, 1, -2))
        shapes = [tuple(own[3 : 3 + min(own[2], _SIZES)]) for own in facts]
        if len(set(tables)) > 1:
            difference = "they look up different tables, having taken different branches"
        elif len(set(numbers)) > 1:
            difference = f"it is lookup number {_by_rank(numbers)}"
        elif len(set(shapes)) > 1:
            difference = f"their shapes are {_by_rank(shapes)}"
        elif len(set(checksums)) > 1:
            difference = self._first_differences(others)
        else:
            difference = (
                "these ids are the same, but since the last comparison others differed, and were "
                f"used. Find the first ones with {VARIABLE}=1, which compares each lookup"
            )
        ranks = f"rank {others[0]}" if len(others) == 1 else f"ranks {others}"
        raise GangError(
            f"All ranks of {self._gang} must look up the same ids in {self._where}, but in lookup "
            f"{numbers[0]} {ranks} and rank 0 disagree: {difference}. Give the ranks of a gang one "
            "batch: split the data over the data-parallel ranks only, with "
            "`DistributedSampler(..., num_replicas=<data-parallel size>, rank=<data-parallel "
            "rank>)`, or broadcast it with `gang.broadcast(ids)`, also if the model samples it "
            "(generation, GRPO). To give each rank its own ids, gather them, and pass "
            f'`output="sequence"` to return each rank its part. {VARIABLE}=0 disables this check.'
        )

    def _first_differences(self, others: list[int]) -> str:
        if self._ids is None:
            return "the values or their order differ"
        own = self._ids.long()
        found = own.new_empty(self._gang.size, len(own))
        self._gang.all_gather(found, own)
        rows = found.tolist()
        parts = []
        for rank in others:
            pairs = list(zip(rows[0], rows[rank], strict=True))
            places = [index for index, (first, other) in enumerate(pairs) if first != other]
            flat = torch.tensor(places[0], device="cpu")
            position = tuple(int(i) for i in torch.unravel_index(flat, self._shape))
            first, other = map(_shown, pairs[places[0]])
            parts.append(
                f"rank {rank} has {other} at position {position} where rank 0 has {first} "
                f"({len(places)} of {len(pairs)} differ)"
            )
        return "; ".join(parts)


def _by_rank(values: list[Any]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))


def _shown(id: int) -> str:
    return "padding" if id == _PADDING else str(id)


_cached_weights: dict[torch.device, Tensor] = {}


def _weights(count: int, device: torch.device) -> Tensor:
    """Returns an odd pseudorandom weight for each position, so that checksums depend on the order.
    *Shape:* :math:`(count)`. *Dtype:* int64.

    Applies the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) to the positions. An id that differs at one position always changes the sum,
    since odd numbers have an inverse modulo 2**64.
    """
    weights = _cached_weights.get(device)
    if weights is None or len(weights) < count:
        with torch.inference_mode(False):
            size = max(1024, 1 << (count - 1).bit_length())
            weights = torch.arange(1, size + 1, device=device) * _ODD
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                high = (weights >> shift) & ((1 << (64 - shift)) - 1)
                weights = (weights ^ high) * (factor - (1 << 64))
            _cached_weights[device] = weights = weights | 1
    return weights[:count]
