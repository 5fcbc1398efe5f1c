"""Checks of token ids: their dtype, and that each is a row of the table."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

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
    """``ids`` as int32 or int64, which torch can index with.

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


class IdCheck:
    """Raises :class:`IndexError` for ids outside ``[0, num_embeddings)``.

    On the CPU it raises at once. On an accelerator reading the answer at once would stall the
    stream at every step, so the answer is copied to the host in the background, and the call that
    comes two calls later raises: on every rank the same one, so that none is left waiting in a
    collective. Until then such an id reads another row of the table. :meth:`flush` raises what
    is still to come. Nothing is checked while a stream is captured: a graph that is replayed calls
    nothing on the host.

    :param lag: how many calls later the answer is looked at; if ``None``, 0 on the CPU, else 2.
    """

    def __init__(self, lag: int | None = None) -> None:
        self._lag = lag
        self._pending: deque[_Answer] = deque()

    def __call__(self, ids: Tensor, num_embeddings: int, where: object) -> None:
        """
        :param ids: *Shape:* any. *Dtype:* int32 or int64.
        :param where: printed as the place that the ids were given to.
        :raises IndexError: it names the smallest bad id, its first position, and the range.
        """
        if ids.is_meta or not ids.numel():
            return
        on_cpu = ids.device.type == "cpu"
        if not on_cpu and torch.accelerator.current_stream(ids.device).is_capturing():
            return
        lag = self._lag if self._lag is not None else 0 if on_cpu else 2
        if lag == 0 and on_cpu:
            low, high = ids.aminmax()
            if low >= 0 and high < num_embeddings:
                return
        self._pending.append(_Answer(ids, num_embeddings, where))
        while len(self._pending) > lag:
            self._pending.popleft().report()

    def flush(self) -> None:
        """Waits for the answers to all calls so far.

        :raises IndexError: as a call.
        """
        while self._pending:
            self._pending.popleft().report()

    def __getstate__(self) -> dict[str, Any]:
        return {"_lag": self._lag, "_pending": deque()}  # Events belong to this process.


class _Answer:
    """The smallest bad id and its first position, if there is any, on the way to the host."""

    def __init__(self, ids: Tensor, num_embeddings: int, where: object) -> None:
        self._shape, self._num_embeddings, self._where = ids.shape, num_embeddings, where
        flat = ids.flatten().long()
        bad = (flat < 0) | (flat >= num_embeddings)
        smallest = flat.masked_fill(~bad, torch.iinfo(torch.int64).max).min()
        positions = torch.arange(len(flat), device=ids.device)
        first = positions.masked_fill(~bad | (flat != smallest), len(flat)).min()
        self._answer = torch.stack([bad.any(), smallest, first])
        self._event: torch.Event | None = None
        if ids.device.type != "cpu":
            host = torch.empty_like(self._answer, device="cpu", pin_memory=True)
            self._answer = host.copy_(self._answer, non_blocking=True)
            self._event = torch.accelerator.current_stream(ids.device).record_event()

    def report(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        any_bad, bad_id, index = self._answer.tolist()
        if not any_bad:
            return
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), self._shape))
        raise IndexError(
            f"All ids in `x` must be in [0, {self._num_embeddings}) (num_embeddings), but the id "
            f"at position {position} is {bad_id} instead, on {self._where}. Check the tokenizer "
            "against the size of the table."
        )
