"""Checks the dtype and the range of token ids."""

from __future__ import annotations

from collections import deque
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.gang.agreement import of_all_ranks

_INDEX_DTYPES = (torch.int32, torch.int64)
_INTEGER_DTYPES = (
    *_INDEX_DTYPES,
    torch.int8,
    torch.int16,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def as_indices(ids: Tensor) -> Tensor:
    """Returns ``ids`` as int32 or int64, which torch can index with.

    :raises TypeError: ``ids`` is not a tensor of an integer dtype.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"`x` must be a tensor of token ids, but is a {type(ids)} instead.")
    if ids.dtype in _INDEX_DTYPES:
        return ids
    if ids.dtype in _INTEGER_DTYPES:
        return ids.long()
    raise TypeError(
        f"`x` must have an integer dtype, but has {ids.dtype} instead. Convert it with `x.long()`."
    )


class Check(Protocol):
    """A check whose result is known or still on its way to the host."""

    def report(self) -> None:
        """Raises if the check failed."""


class LateCheck:
    """Reads the results of checks: at once on the CPU. On an accelerator that would stall the
    stream at every step, so results are copied to the host in the background and read two calls
    later. Every rank then raises in the same call, so that none is left waiting in a collective.

    :param lag: how many calls later a result is read; if ``None``, 0 on the CPU, else 2.
    """

    def __init__(self, lag: int | None = None) -> None:
        self._lag = lag
        self._pending: deque[Check] = deque()

    def flush(self) -> None:
        """Waits for the results of all calls so far.

        :raises Exception: as a call.
        """
        while self._pending:
            self._pending.popleft().report()

    def lag_on(self, device: torch.device) -> int:
        """Returns how many calls later the result of a check on ``device`` is read."""
        if self._lag is not None:
            return self._lag
        return 0 if device.type == "cpu" else 2

    def _look(self, check: Check, lag: int) -> None:
        if not lag:
            check.report()  # Not through the queue, which may hold checks of other threads.
            return
        self._pending.append(check)
        while len(self._pending) > lag:
            self._pending.popleft().report()


def is_capturing(device: torch.device) -> bool:
    """Returns whether a graph is being captured on ``device``; its replay runs no host code."""
    return device.type != "cpu" and bool(torch.accelerator.current_stream(device).is_capturing())


class ToHost:
    """Copies numbers to the host in the background."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._event: torch.Event | None = None
        if numbers.device.type != "cpu":
            host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers = host.copy_(numbers, non_blocking=True)
            self._event = torch.accelerator.current_stream(numbers.device).record_event()

    def read(self) -> Any:
        """Waits for the numbers and returns them as a list."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


class IdCheck(LateCheck):
    """Raises :class:`IndexError` for ids outside ``[0, num_embeddings)``.

    Until the result is read, such an id reads another row of the table. Checks nothing during graph
    capture, since a replay runs no host code.
    """

    def __call__(self, ids: Tensor, num_embeddings: int, where: object) -> None:
        """
        :param ids: *Shape:* any. *Dtype:* int32 or int64.
        :param where: where the ids were looked up, for the error.
        :raises IndexError: an id is out of range; names the smallest one, its first position, and
            the range.
        """
        if ids.is_meta or not ids.numel() or is_capturing(ids.device):
            return
        lag = self.lag_on(ids.device)
        if lag == 0 and ids.device.type == "cpu":
            low, high = ids.aminmax()
            if low >= 0 and high < num_embeddings:
                return
        self._look(_RangeCheck(ids, num_embeddings, where), lag)


def raise_together(ids: Tensor, num_embeddings: int, gang: Gang) -> NoReturn:
    """Raises the error of the first rank that has an id out of range on all ranks of ``gang``.

    :param ids: the ids of this rank, in range or not.
    :raises IndexError: as :class:`IdCheck`.
    """
    own = None
    try:
        if ids.numel():
            _RangeCheck(ids, num_embeddings, gang).report()
    except IndexError as e:
        own = str(e)
    raise IndexError(next(filter(None, of_all_ranks(gang, own))))


class _RangeCheck:
    """Finds the smallest bad id and its first position, and copies them to the host."""

    def __init__(self, ids: Tensor, num_embeddings: int, where: object) -> None:
        self._shape, self._num_embeddings, self._where = ids.shape, num_embeddings, where
        flat = ids.flatten().long()
        bad = (flat < 0) | (flat >= num_embeddings)
        smallest = flat.masked_fill(~bad, torch.iinfo(torch.int64).max).min()
        positions = torch.arange(len(flat), device=ids.device)
        first = positions.masked_fill(~bad | (flat != smallest), len(flat)).min()
        self._result = ToHost(torch.stack([bad.any(), smallest, first]))

    def report(self) -> None:
        any_bad, bad_id, index = self._result.read()
        if not any_bad:
            return
        position = tuple(
            int(i) for i in torch.unravel_index(torch.tensor(index, device="cpu"), self._shape)
        )
        raise IndexError(
            f"All ids in `x` must be in [0, {self._num_embeddings}) (num_embeddings), but the id "
            f"at position {position} is {bad_id} instead, on {self._where}. Check the tokenizer "
            "against the size of the table."
        )
