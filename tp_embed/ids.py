"""Checks of token ids: their dtype, and that each is a row of the table."""

from __future__ import annotations

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

    On the CPU it raises at once. On an accelerator reading the answer would stall the stream at
    every step, so the answer is copied to the host in the background and looked at by the next
    call that finds it there: the error names the same id, a step or more late. Until then the
    lookup reads some valid row in its place.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Event | None, Tensor, torch.Size, int, object]] = []

    def __call__(self, ids: Tensor, num_embeddings: int, where: object) -> None:
        """
        :param ids: *Shape:* any. *Dtype:* int32 or int64.
        :param where: printed as the place that the ids were given to.
        :raises IndexError: it names the smallest bad id, its first position, and the range.
        """
        if ids.is_meta or not ids.numel():
            return
        if ids.device.type == "cpu":
            low, high = ids.aminmax()
            if low < 0 or high >= num_embeddings:
                self._start(ids, num_embeddings, where)
        else:
            self._start(ids, num_embeddings, where)
        while self._pending and self._is_ready(self._pending[0][0]):
            self._report(*self._pending.pop(0)[1:])

    def _start(self, ids: Tensor, num_embeddings: int, where: object) -> None:
        flat = ids.flatten().long()
        bad = (flat < 0) | (flat >= num_embeddings)
        smallest = flat.masked_fill(~bad, torch.iinfo(torch.int64).max).min()
        positions = torch.arange(len(flat), device=ids.device)
        first = positions.masked_fill(~bad | (flat != smallest), len(flat)).min()
        answer = torch.stack([bad.any(), smallest, first])
        event = None
        if answer.device.type != "cpu":
            host = torch.empty_like(answer, device="cpu", pin_memory=True)
            answer = host.copy_(answer, non_blocking=True)
            event = torch.Event(ids.device)
            event.record()
        self._pending.append((event, answer, ids.shape, num_embeddings, where))

    @staticmethod
    def _is_ready(event: torch.Event | None) -> bool:
        return event is None or event.query()

    @staticmethod
    def _report(answer: Tensor, shape: torch.Size, num_embeddings: int, where: object) -> None:
        any_bad, bad_id, index = answer.tolist()
        if not any_bad:
            return
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape))
        raise IndexError(
            f"All ids in `x` must be in [0, {num_embeddings}) (num_embeddings), but the id at "
            f"position {position} is {bad_id} instead, on {where}. Check the tokenizer against the "
            "size of the table."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_pending": []}  # An event belongs to this process and its device.
