"""Sends rows of a table to ranks that each look up ids of their own, and gradients back.

No rank knows what the others want, so they exchange counts, then ids, then rows. This is row-wise
sharding (Ivchenko et al., "TorchRec: a PyTorch domain library for recommendation systems", 2022).
"""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

from tp_embed.gang import Gang, GangError
from tp_embed.lookup.distinct import find_distinct
from tp_embed.lookup.exchange import Dedup, Exchange, Place, ReturnedGrads, Staging
from tp_embed.lookup.gradient import sum_by_id
from tp_embed.lookup.ids import raise_together
from tp_embed.mapped.store import select_rows


class OwnIds:
    """Counts the lookups of one table, so that ranks can check that they do the same one.

    :param name: the name of the table in errors, the same on every rank.
    """

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0

    def exchange_counts(
        self, gang: Gang, counts: Tensor, is_bad: Tensor
    ) -> tuple[list[int], list[int], bool]:
        """Tells each rank how many rows this rank wants from it. All ranks must call it; each sends
        32 (P-1) bytes, and waits for the numbers.

        :param counts: the number of rows for each rank. *Shape:* :math:`(P)`.
        :param is_bad: whether this rank has ids out of range. *Shape:* :math:`()`.
        :returns: ``counts``, the number of rows that each rank wants, and whether any rank has ids
            out of range.
        :raises GangError: ranks look up different tables; raised on all ranks.
        """
        self._count += 1
        facts = counts.new_tensor([crc32(self._name.encode()), self._count])
        own = torch.cat([torch.stack([*facts, is_bad]).expand(gang.size, 3), counts[:, None]], 1)
        others = torch.empty_like(own)
        gang.all_to_all(others, own)
        rows: list[list[int]] = torch.cat([own, others]).tolist()
        tables = [(table, number) for table, number, *_ in rows[gang.size :]]
        if any(table != tuple(rows[0][:2]) for table in tables):
            raise GangError(
                f"All ranks of {gang} must do the same lookups in the same order, but this is "
                f"lookup number {self._count} of {self._name} on rank {gang.rank}, and another one "
                f"on other ranks; the numbers are {[number for _, number in tables]}. A rank "
                "without ids must call the table too, with an empty tensor."
            )
        wanted, given = (
            [row[3] for row in part] for part in (rows[: gang.size], rows[gang.size :])
        )
        return wanted, given, any(row[2] for row in rows)


class RowsToOwn(Exchange):
    """Forward: three all-to-alls: 32 bytes to each rank, the distinct ids that this rank wants from
    it, 4 bytes each, and the rows that it wants, E items each. Backward: one all-to-all, E items
    for each distinct id that this rank wants from others. Gradients are summed per id on the rank
    that looked it up, then on the owner in the order of the ranks. Without de-duplication each
    position counts: more is sent, and all gradients are summed on the owner, by rank and position,
    bit for bit as by one process with the ids of all ranks.

    :param ids: the ids of this rank. *Shape:* any.
    :param kept: the positions in ``ids`` to look up; ``None`` for all. *Shape:* as ``ids``.
        *Dtype:* bool.
    :param mean: whether gradients are averaged over the ranks instead of summed.

    ``rows`` are the rows of this rank's block that ranks want, by rank.

    :raises IndexError: an id on any rank is out of range; raised on all ranks.
    """

    def __init__(
        self,
        place: Place,
        ids: Tensor,
        kept: Tensor | None,
        dedup: Dedup,
        staging: Staging,
        table: OwnIds,
        mean: bool,
    ) -> None:
        gang, num_rows, block = place.gang, place.num_rows, place.partition.block
        flat = (ids.flatten() if kept is None else ids[kept]).long()
        positions = place.position(flat.clamp(0, num_rows - 1))
        super().__init__(place, positions, None, dedup is not False, staging)
        self._mean = mean
        distinct = self.distinct[0] if self.is_deduped else find_distinct(positions)
        self._sorted = distinct
        wanted = distinct.ids if self.is_deduped else positions[distinct.order]
        bounds = torch.arange(gang.size + 1, device=wanted.device) * block
        counts = torch.searchsorted(wanted, bounds).diff()
        is_bad = ((flat < 0) | (flat >= num_rows)).any()
        self._wanted, self._given, any_bad = table.exchange_counts(gang, counts, is_bad)
        if any_bad:
            raise_together(ids if kept is None else ids.masked_fill(~kept, 0), num_rows, gang)
        self.rows = torch.empty(sum(self._given), dtype=torch.int32, device=wanted.device)
        gang.all_to_all(self.rows, (wanted % block).int(), self._given, self._wanted)

    def fetch(self, weight: Tensor) -> Tensor:
        dim = weight.size(1)
        send = self.staging.take("sent", (len(self.rows), dim), weight)
        select_rows(weight, self.rows, out=send)
        rows = self.staging.take("received", (sum(self._wanted), dim), weight)
        self.gang.all_to_all(rows, send, self._wanted, self._given)
        if self.is_deduped:
            return rows.index_select(0, self._sorted.inverse())
        return torch.empty_like(rows).index_copy_(0, self._sorted.order, rows)

    def backward(self, grad: Tensor) -> ReturnedGrads:
        dim = grad.size(1)
        if self.is_deduped:
            sums = sum_by_id(grad, self._sorted, range(dim))
        else:
            sums = grad.index_select(0, self._sorted.order)
        received = self.staging.take("received", (len(self.rows), dim), grad)
        self.gang.all_to_all(received, sums, self._given, self._wanted)
        if self._mean:
            received /= self.gang.size
        positions = self.rows.long() + self.place.rows.start
        return ReturnedGrads(received, positions, None, range(dim))
