"""Finds the distinct ids of a batch and their positions."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Distinct(NamedTuple):
    """The U distinct values of a list of N ids.

    :param ids: the distinct ids, ascending. *Shape:* :math:`(U)`.
    :param order: the positions in the list, sorted by id. *Shape:* :math:`(N)`.
    :param starts: where the positions of each id start in ``order``. *Shape:* :math:`(U)`.
    """

    ids: Tensor
    order: Tensor
    starts: Tensor

    def inverse(self) -> Tensor:
        """Returns the index in ``ids`` for each position of the list. *Shape:* :math:`(N)`."""
        marks = torch.zeros_like(self.order)
        marks[self.starts[1:]] = 1
        return torch.empty_like(self.order).scatter_(0, self.order, marks.cumsum(0))

    def within(self, rows: range) -> Distinct:
        """Keeps only the ids in ``rows``; positions still refer to the same list."""
        first, last = self._find(rows)
        return self._cut(first, last)

    def without(self, row: int) -> Distinct:
        """Removes one id."""
        first, last = self._find(range(row, row + 1))
        if first == last:
            return self
        before, after = self._cut(0, first), self._cut(last, len(self.ids))
        starts = torch.cat([before.starts, after.starts + len(before.order)])
        return Distinct(
            torch.cat([before.ids, after.ids]), torch.cat([before.order, after.order]), starts
        )

    def counts(self, bounds: list[int]) -> list[int]:
        """Counts the distinct ids between each of the ascending ``bounds`` and the next."""
        found = torch.searchsorted(self.ids, self.ids.new_tensor(bounds)).tolist()
        return [last - first for first, last in pairwise(found)]

    def _find(self, rows: range) -> list[int]:
        bounds: list[int] = torch.searchsorted(
            self.ids, self.ids.new_tensor([rows.start, rows.stop])
        ).tolist()
        return bounds

    def _cut(self, first: int, last: int) -> Distinct:
        ends = torch.cat([self.starts, self.starts.new_tensor([len(self.order)])])
        begin, end = ends[[first, last]].tolist()
        return Distinct(
            self.ids[first:last], self.order[begin:end], self.starts[first:last] - begin
        )


def find_distinct(ids: Tensor, positions: Tensor | None = None) -> Distinct:
    """Finds the distinct ids by sorting. Synchronizes with an accelerator to count them.

    :param ids: *Shape:* :math:`(N)`.
    :param positions: the sort key for equal ids; if ``None``, their order in ``ids``.
        *Shape:* :math:`(N)`.
    """
    if positions is not None:
        by_position = positions.argsort()
        in_order, order = ids[by_position].sort(stable=True)
        order = by_position[order]
    else:
        in_order, order = ids.sort(stable=True)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
    starts = is_first.nonzero()[:, 0]
    return Distinct(in_order[starts], order, starts)
