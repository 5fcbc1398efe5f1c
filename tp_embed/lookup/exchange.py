"""How the rows of a table reach the ranks that want them, and how gradients come back.

Every rank holds the same ids, so each knows what the others want and who holds it: no ids travel,
no sizes either, and an id that occurs often travels once. There is a class for each way to cut a
table, over its columns or its rows, and for each wish: all ids, or a block of them for each rank.

Volumes are what one rank sends, in items, for N ids of which U are distinct (of those that rank q
wants :math:`N_q` and :math:`U_q`), a gang of P, and :math:`E_{rank}` of E columns. What is written
as U is N without de-duplication.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.lookup.distinct import Distinct, find_distinct
from tp_embed.partition import Partition

Dedup = Literal["auto"] | bool

# With a larger share of distinct ids, columns cost as much to put in their places as to send. Rows
# never do: they are U E where the all-reduce has 2 N E.
_COLUMNS_WORTH_SHARE = 0.85


@dataclass(frozen=True)
class Place:
    """Which block of a table of V x E this rank of a gang holds: that of ``partition``, along
    ``dim``."""

    gang: Gang
    partition: Partition
    dim: Literal[0, 1]
    rows: range
    columns: range

    @property
    def num_rows(self) -> int:
        """V."""
        return len(self.rows) if self.dim else self.partition.size

    @property
    def num_columns(self) -> int:
        """E."""
        return self.partition.size if self.dim else len(self.columns)


class Staging(threading.local):
    """Memory for what is sent and received, which the next step takes again: on a CPU it costs more
    to get it anew, page by page, than to write to it. An accelerator's allocator does that. Each
    thread has its own."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of the dtype and on the device of ``like``, with any values. It is valid until
        memory of the same name is taken."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        nbytes = prod(shape) * like.element_size()
        memory = self._memory.get(name)
        if memory is None or len(memory) < nbytes:
            with torch.inference_mode(False):  # It is written to in any mode.
                memory = self._memory[name] = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return memory[:nbytes].view(like.dtype).view(*shape)


class ReturnedGrads(NamedTuple):
    """What came back of a gradient: ``grad[i]`` is of the id ``ids[i]``.

    :param grad: *Shape:* :math:`(M,E)` or :math:`(M,E_{rank})`.
    :param ids: *Shape:* :math:`(M)`.
    :param positions: by which to order what is of one id, if not by itself. *Shape:* :math:`(M)`.
    :param columns: which of those of ``grad`` are of this rank's block.
    :param distinct: of ``ids``, if known already.
    """

    grad: Tensor
    ids: Tensor
    positions: Tensor | None
    columns: range
    distinct: Distinct | None = None


class Exchange(ABC):
    """One lookup over a gang of more than one rank.

    :param ids: N ids, the same on every rank. *Shape:* :math:`(N)`.
    :param blocks: for each rank the positions in ``ids`` that it wants, ascending; ``None`` if
        every rank wants all.
    """

    # The share of distinct ids up to which it is worth to de-duplicate.
    worth_share: ClassVar[float] = 1.0

    def __init__(
        self,
        place: Place,
        ids: Tensor,
        blocks: Sequence[Tensor] | None,
        dedup: Dedup,
        staging: Staging,
    ) -> None:
        self.place, self.gang, self.staging = place, place.gang, staging
        self.ids, self.blocks = ids, blocks or ()
        lists = [ids[block] for block in self.blocks] or [ids]
        self.lists = lists
        # To count what is distinct means to wait for it on an accelerator.
        self.may_ask = ids.device.type == "cpu" or dedup is True
        self.distinct: list[Distinct] = []
        self.is_deduped = dedup is True or (dedup == "auto" and self.may_ask)
        if self.is_deduped:
            self.distinct = [find_distinct(wanted) for wanted in lists]
            share = sum(len(d.ids) for d in self.distinct) / max(1, sum(map(len, lists)))
            self.is_deduped = dedup is True or share <= self.worth_share

    @abstractmethod
    def fetch(self, weight: Tensor) -> Tensor:
        """The rows of the table that this rank wants, bit for bit. *Shape:* :math:`(N,E)`."""

    @abstractmethod
    def backward(self, grad: Tensor) -> ReturnedGrads:
        """What this rank's block gets of the gradients of all ranks.

        :param grad: of what :meth:`fetch` gave to this rank.
        """

    def _own(self, items: Sequence[Any]) -> Any:
        return items[self.gang.rank]

    def _put_together(self, blocks: Tensor, inverse: Tensor | None) -> Tensor:
        """Puts the ranks' columns of each row beside each other, in one pass.

        :param blocks: *Shape:* :math:`(P,U,B)`, padded to B columns.
        :param inverse: which rows, if not all. *Shape:* :math:`(N)`.
        """
        size, count, width = blocks.shape
        if inverse is None:
            joined = blocks.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        else:
            index = inverse[:, None] + torch.arange(size, device=inverse.device) * count
            joined = blocks.view(size * count, width).index_select(0, index.flatten())
        dim = self.place.partition.size
        joined = joined.view(-1, size * width)
        return joined if joined.size(1) == dim else joined[:, :dim].contiguous()


class _ToAll(Exchange):
    """Every rank has all gradients, and takes what is of its block."""

    def backward(self, grad: Tensor) -> ReturnedGrads:
        distinct = self.distinct[0] if self.distinct else None
        return ReturnedGrads(grad, self.ids, None, self.place.columns, distinct)


class ColumnsToAll(_ToAll):
    """Forward: one all-gather, (P-1) U B with :math:`B=\\lceil E/P\\rceil`. Backward: nothing."""

    worth_share = _COLUMNS_WORTH_SHARE

    def fetch(self, weight: Tensor) -> Tensor:
        wanted = self.distinct[0].ids if self.is_deduped else self.ids
        width = self.place.partition.block
        shape = self.gang.size, len(wanted), width
        blocks = self.staging.take("received", shape, weight)
        if weight.size(1) == width:
            own = blocks[self.gang.rank]
            torch.index_select(weight, 0, wanted, out=own)
        else:  # Only trailing blocks are short.
            own = weight.index_select(0, wanted)
            own = torch.nn.functional.pad(own, (0, width - own.size(1)))
        self.gang.all_gather(blocks, own)
        return self._put_together(blocks, self.distinct[0].inverse() if self.is_deduped else None)


class ColumnsToBlocks(Exchange):
    """Forward: one all-to-all, :math:`U_q E_{rank}` to each rank q. Backward: one all-to-all,
    :math:`N_{rank} E_q` to each rank q: gradients of one id are not added up before they are sent,
    so that the order of the sum does not depend on the gang."""

    worth_share = _COLUMNS_WORTH_SHARE

    def fetch(self, weight: Tensor) -> Tensor:
        wanted = [d.ids for d in self.distinct] if self.is_deduped else self.lists
        widths = self.place.partition.sizes
        counts, count = [len(ids) for ids in wanted], len(self._own(wanted))
        sent = [n * self._own(widths) for n in counts]
        received = [count * width for width in widths]
        send = self.staging.take("sent", (sum(sent),), weight)
        for ids, part in zip(wanted, send.split(sent), strict=True):
            torch.index_select(weight, 0, ids, out=part.view(len(ids), weight.size(1)))
        receive = self.staging.take("received", (sum(received),), weight)
        self.gang.all_to_all(receive, send, received, sent)
        block = self.place.partition.block
        if len(set(widths)) == 1:
            blocks = receive.view(self.gang.size, count, block)
        else:
            blocks = weight.new_zeros(self.gang.size, count, block)
            for rank, part in enumerate(receive.split(received)):
                blocks[rank, :, : widths[rank]] = part.view(count, widths[rank])
        return self._put_together(
            blocks, self._own(self.distinct).inverse() if self.is_deduped else None
        )

    def backward(self, grad: Tensor) -> ReturnedGrads:
        partition, width = self.place.partition, len(self.place.columns)
        sent = [len(grad) * size for size in partition.sizes]
        received = [len(ids) * width for ids in self.lists]
        send = self.staging.take("sent", (grad.numel(),), grad)
        for rank, part in enumerate(send.split(sent)):
            columns = partition.shard(rank)
            part.view(len(grad), len(columns)).copy_(grad[:, columns.start : columns.stop])
        receive = self.staging.take("received", (sum(received),), grad)
        self.gang.all_to_all(receive, send, received, sent)
        ids = torch.cat(self.lists)
        return ReturnedGrads(
            receive.view(len(ids), width), ids, torch.cat(list(self.blocks)), range(width)
        )


class RowsToAll(_ToAll):
    """Forward: each distinct row from its owner to all, (P-1) :math:`U_{rank}` E. If one owner has
    more than U/(P-1) of them they are spread first, by an all-to-all, and what a rank sends is at
    most (P-1)/P :math:`U_{rank}` E + (P-1) :math:`\\lceil U/P\\rceil` E. Without de-duplication one
    all-reduce, 2 (P-1)/P N E. Backward: nothing."""

    def fetch(self, weight: Tensor) -> Tensor:
        if not self.is_deduped:
            output = _rows_or_zeros(weight, self.ids, self.place.rows)
            self.gang.all_reduce(output)
            return output
        distinct, size, rank = self.distinct[0], self.gang.size, self.gang.rank
        counts = distinct.counts(_bounds(self.place.partition))
        total, dim = len(distinct.ids), weight.size(1)
        rows = self.staging.take("received", (total, dim), weight)
        first = sum(counts[:rank])
        local = distinct.ids[first : first + counts[rank]] - self.place.rows.start
        if size > 2 and max(counts) * (size - 1) > total:
            own = self.staging.take("sent", (counts[rank], dim), weight)
            torch.index_select(weight, 0, local, out=own)
            own, counts = self._spread(own, counts, rows)
        else:
            own = rows[first : first + counts[rank]]
            torch.index_select(weight, 0, local, out=own)
        self.gang.all_gather(rows, own, counts)
        return rows.index_select(0, distinct.inverse())

    def _spread(self, own: Tensor, counts: list[int], rows: Tensor) -> tuple[Tensor, list[int]]:
        """Gives each rank as many of ``rows`` as another, into its part of them."""
        rank, even = self.gang.rank, Partition(len(rows), self.gang.size)
        ends = [0, *accumulate(counts)]
        held = [range(*pair) for pair in pairwise(ends)]
        parts = [even.shard(r) for r in range(self.gang.size)]
        sent = [_overlap(held[rank], part) for part in parts]
        received = [_overlap(of, parts[rank]) for of in held]
        part = rows[parts[rank].start : parts[rank].stop]
        self.gang.all_to_all(part, own, received, sent)
        return part, [len(part) for part in parts]


class RowsToBlocks(Exchange):
    """Forward: one all-to-all, to each rank q those of its :math:`U_q` rows that this rank holds.
    Without de-duplication one reduce-scatter, (P-1)/P N E. Backward: one all-to-all, to each rank
    the gradients of those of the own :math:`N_{rank}` positions whose rows it holds, each of E. (On
    an accelerator, without de-duplication: one all-gather, (P-1) :math:`N_{rank}` E.)"""

    def fetch(self, weight: Tensor) -> Tensor:
        if not self.is_deduped:
            return self._reduce_scatter(weight)
        dim, own = weight.size(1), self._own(self.distinct)
        wanted = [d.within(self.place.rows).ids - self.place.rows.start for d in self.distinct]
        sent, received = [len(rows) for rows in wanted], own.counts(_bounds(self.place.partition))
        send = self.staging.take("sent", (sum(sent), dim), weight)
        torch.index_select(weight, 0, torch.cat(wanted), out=send)
        rows = self.staging.take("received", (sum(received), dim), weight)
        self.gang.all_to_all(rows, send, received, sent)
        return rows.index_select(0, own.inverse())

    def _reduce_scatter(self, weight: Tensor) -> Tensor:
        most = max(len(ids) for ids in self.lists)
        padded = torch.stack(
            [torch.nn.functional.pad(ids, (0, most - len(ids)), value=-1) for ids in self.lists]
        )
        rows = _rows_or_zeros(weight, padded.flatten(), self.place.rows)
        output = weight.new_empty(most, weight.size(1))
        self.gang.reduce_scatter(output, rows.view(self.gang.size, most, weight.size(1)))
        return output[: len(self._own(self.lists))]

    def backward(self, grad: Tensor) -> ReturnedGrads:
        dim = grad.size(1)
        if not self.may_ask:
            counts = [len(ids) for ids in self.lists]
            receive = self.staging.take("received", (sum(counts), dim), grad)
            self.gang.all_gather(receive, grad.contiguous(), counts)
            ids, positions = torch.cat(self.lists), torch.cat(list(self.blocks))
            return ReturnedGrads(receive, ids, positions, range(dim))
        distinct = self.distinct or [find_distinct(ids) for ids in self.lists]
        size, partition = self.gang.size, self.place.partition
        owners = [self._own(distinct).within(partition.shard(r)).order for r in range(size)]
        here = [d.within(self.place.rows).order for d in distinct]
        sent, received = [len(order) for order in owners], [len(order) for order in here]
        send = self.staging.take("sent", (sum(sent), dim), grad)
        torch.index_select(grad, 0, torch.cat(owners), out=send)
        receive = self.staging.take("received", (sum(received), dim), grad)
        self.gang.all_to_all(receive, send, received, sent)
        positions = torch.cat([b[order] for b, order in zip(self.blocks, here, strict=True)])
        return ReturnedGrads(receive, self.ids[positions], positions, range(dim))


def _rows_or_zeros(weight: Tensor, ids: Tensor, rows: range) -> Tensor:
    """Rows of a block, with -0.0 in the place of rows that the block does not hold.

    -0.0 is what leaves every float, 0.0 and -0.0 included, as it is when added, so that the sum
    over the blocks of a table is the table's row bit for bit.
    """
    # Not a view, so that the sum over the gang may overwrite it.
    output = weight.new_empty(len(ids), weight.size(1))
    if not rows:
        return output.fill_(-0.0)
    local = ids - rows.start
    safe = local.clamp(0, len(rows) - 1)
    torch.index_select(weight, 0, safe, out=output)
    return output.masked_fill_((local != safe)[:, None], -0.0)


def _bounds(partition: Partition) -> list[int]:
    """Where the blocks begin, and where the last one ends."""
    return [0, *accumulate(partition.sizes)]


def _overlap(first: range, second: range) -> int:
    return max(0, min(first.stop, second.stop) - max(first.start, second.start))
