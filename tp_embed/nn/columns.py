"""Operations on the logits of a rank, *Shape:* :math:`(V_{rank},N)`: a column for each token."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Functions that need temporaries split the classes into this many parts.
_PARTS = 16


def parts_of(logits: Tensor, *, split: bool) -> Iterator[slice]:
    """Splits the classes of ``logits``, *Shape:* :math:`(V_{rank},n)`."""
    step = max(1, -(-len(logits) // (_PARTS if split else 1)))
    return (slice(start, start + step) for start in range(0, len(logits), step))


def picked(z: Tensor, ids: Tensor, own: range) -> Tensor:
    """Returns the logits of ``ids``, *Shape:* :math:`(N,K)`, or zero where this rank doesn't have
    the class. *Shape:* :math:`(K,N)`."""
    row, held = _rows(ids, own)
    logits = z.gather(0, row.T) if own else z.sum(0).expand(ids.size(1), -1)
    return logits.masked_fill(~held.T, 0.0)  # Logits of other classes may be -inf.


def add_to_picked(z: Tensor, ids: Tensor, own: range, values: Tensor) -> None:
    """Adds ``values``, *Shape:* :math:`(N,K)`, to the logits of ``ids`` that this rank has."""
    if own:
        row, held = _rows(ids, own)
        z.scatter_add_(0, row.T, values.masked_fill(~held, 0.0).T)


def _rows(ids: Tensor, own: range) -> tuple[Tensor, Tensor]:
    """Returns the row of each id in ``own``, and whether it is one of them, without synchronizing
    with the device."""
    local = ids - own.start
    held = (local >= 0) & (local < len(own))
    return local.clamp(0, max(len(own) - 1, 0)), held
