"""Sends rows of a table to the ranks that need them, and gradients back.

Every rank has the same ids, so each knows which rows the others need and who holds them: neither
ids nor sizes are sent, and the row of a repeated id is sent once. There is one class per sharded
dimension, columns or rows, and output: all ids for every rank, or a block of ids for each.
:mod:`tp_embed.lookup.own_ids` is for ranks with ids of their own.

Volumes are what one rank sends, in items, for N ids with U distinct ones (rank q needs :math:`N_q`
ids with :math:`U_q` distinct ones), a gang of size P, and :math:`E_{rank}` of E columns. Without
de-duplication, replace U by N.
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
from tp_embed.mapped.store import select_rows
from tp_embed.partition import Partition, overlap

Dedup = Literal["auto"] | bool

# With a larger share of distinct ids, scattering columns to their positions costs as much as
# sending them. For rows it never does: they send U E instead of the 2 N E of an all-reduce.
_COLUMNS_WORTH_SHARE = 0.85


@dataclass(frozen=True)
class Place:
    """The block of a V x E table that this rank of a gang holds, by ``partition`` along ``dim``.
    ``rows`` are positions, see :meth:`position`."""

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

    def position(self, row: Any) -> Any:
        """Returns the position of a row, or of a tensor of rows, see :meth:`Partition.position`."""
        return row if self.dim else self.partition.position(row)


class Staging(threading.local):
    """Send and receive buffers, reused by the next step: on a CPU, page faults in new memory cost
    more than writing to it. An accelerator's caching allocator needs no help. Thread-local."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns an uninitialized buffer with the dtype and device of ``like``, valid until the
        next call with the same name."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        nbytes = prod(shape) * like.element_size()
        memory = self._memory.get(name)
        if memory is None or len(memory) < nbytes:
            with torch.inference_mode(False):  # Later steps may write to it in other modes.
                memory = self._memory[name] = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return memory[:nbytes].view(like.dtype).view(*shape)


class ReturnedGrads(NamedTuple):
    """Gradients received for this rank's block: ``grad[i]`` belongs to ``ids[i]``.

    :param grad: *Shape:* :math:`(M,E)` or :math:`(M,E_{rank})`.
    :param ids: *Shape:* :math:`(M)`.
    :param positions: the summation order for equal ids; if ``None``, their order in ``ids``.
        *Shape:* :math:`(M)`.
    :param columns: the columns of ``grad`` that belong to this rank's block.
    :param distinct: the distinct values of ``ids``, if known already.
    """

    grad: Tensor
    ids: Tensor
    positions: Tensor | None
    columns: range
    distinct: Distinct | None = None


class Exchange(ABC):
    """One lookup over a gang of more than one rank.

    :param ids: N ids, the same on every rank. *Shape:* :math:`(N)`.
    :param blocks: for each rank the positions in ``ids`` it needs, ascending; ``None`` if every
        rank needs all.
    """

    # De-duplicating pays off up to this share of distinct ids.
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
        # Counting distinct ids synchronizes with an accelerator.
        self.may_ask = ids.device.type == "cpu" or dedup is True
        self.distinct: list[Distinct] = []
        self.is_deduped = dedup is True or (dedup == "auto" and self.may_ask)
        if self.is_deduped:
            self.distinct = [find_distinct(wanted) for wanted in lists]
            share = sum(len(d.ids) for d in self.distinct) / max(1, sum(map(len, lists)))
            self.is_deduped = dedup is True or share <= self.worth_share

    @abstractmethod
    def fetch(self, weight: Tensor) -> Tensor:
        """Returns the rows of the table this rank needs, bit for bit. *Shape:* :math:`(N,E)`."""

    @abstractmethod
    def backward(self, grad: Tensor) -> ReturnedGrads:
        """Returns the gradients of all ranks for this rank's block.

        :param grad: the gradient of the output of :meth:`fetch`.
        """

    def _own(self, items: Sequence[Any]) -> Any:
        return items[self.gang.rank]

    def _put_together(self, blocks: Tensor, inverse: Tensor | None) -> Tensor:
        """Concatenates the ranks' columns of each row, in one pass.

        :param blocks: *Shape:* :math:`(P,U,B)`, padded to B columns.
        :param inverse: the rows to take; if ``None``, all. *Shape:* :math:`(N)`.
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
    """Every rank already has all gradients, so the backward only selects its block."""

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
        else:  # Trailing blocks may be short.
            own = weight.index_select(0, wanted)
            own = torch.nn.functional.pad(own, (0, width - own.size(1)))
        self.gang.all_gather(blocks, own)
        return self._put_together(blocks, self.distinct[0].inverse() if self.is_deduped else None)


class ColumnsToBlocks(Exchange):
    """Forward: one all-to-all, :math:`U_q E_{rank}` to each rank q. Backward: one all-to-all,
    :math:`N_{rank} E_q` to each rank q; gradients are sent before they are summed per id, so that
    the order of summation does not depend on the gang."""

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
    more than U/(P-1) of them, an all-to-all balances them first, and a rank sends at most
    (P-1)/P :math:`U_{rank}` E + (P-1) :math:`\\lceil U/P\\rceil` E. Without de-duplication one
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
            select_rows(weight, local, out=own)
            own, counts = self._balance(own, counts, rows)
        else:
            own = rows[first : first + counts[rank]]
            select_rows(weight, local, out=own)
        self.gang.all_gather(rows, own, counts)
        return rows.index_select(0, distinct.inverse())

    def _balance(self, own: Tensor, counts: list[int], rows: Tensor) -> tuple[Tensor, list[int]]:
        """Gives each rank an equal share of ``rows``, written to its part of ``rows``."""
        rank, even = self.gang.rank, Partition(len(rows), self.gang.size)
        ends = [0, *accumulate(counts)]
        held = [range(*pair) for pair in pairwise(ends)]
        parts = [even.shard(r) for r in range(self.gang.size)]
        sent = [overlap(held[rank], part) for part in parts]
        received = [overlap(of, parts[rank]) for of in held]
        part = rows[parts[rank].start : parts[rank].stop]
        self.gang.all_to_all(part, own, received, sent)
        return part, [len(part) for part in parts]


class RowsToBlocks(Exchange):
    """Forward: one all-to-all, to each rank q the rows among its :math:`U_q` that this rank holds.
    Without de-duplication one reduce-scatter, (P-1)/P N E. Backward: one all-to-all, to each rank
    the gradients, E items each, of those among this rank's :math:`N_{rank}` positions whose rows it
    holds. (On an accelerator, without de-duplication: one all-gather, (P-1) :math:`N_{rank}` E.)"""

    def fetch(self, weight: Tensor) -> Tensor:
        if not self.is_deduped:
            return self._reduce_scatter(weight)
        dim, own = weight.size(1), self._own(self.distinct)
        wanted = [d.within(self.place.rows).ids - self.place.rows.start for d in self.distinct]
        sent, received = [len(rows) for rows in wanted], own.counts(_bounds(self.place.partition))
        send = self.staging.take("sent", (sum(sent), dim), weight)
        select_rows(weight, torch.cat(wanted), out=send)
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
    """Returns rows of a block, with -0.0 for rows that the block doesn't hold.

    Adding -0.0 leaves every float unchanged, even 0.0 and -0.0, so the sum over the blocks of a
    table is the row of the table bit for bit.
    """
    # Not a view, so that the sum over the gang may overwrite it.
    output = weight.new_empty(len(ids), weight.size(1))
    if not rows:
        return output.fill_(-0.0)
    local = ids - rows.start
    safe = local.clamp(0, len(rows) - 1)
    select_rows(weight, safe, out=output)
    return output.masked_fill_((local != safe)[:, None], -0.0)


def _bounds(partition: Partition) -> list[int]:
    """Returns where each block starts, and where the last one ends."""
    return [0, *accumulate(partition.sizes)]


def no_sequence() -> ValueError:
    """Returns the error for ids that have no dimension to split."""
    return ValueError("`x` must have a dimension to split for `output='sequence'`, but has none.")


def sequence_blocks(ids: Tensor, valid: Tensor | None, gang: Gang) -> list[Tensor]:
    """Returns for each rank its contiguous block of positions along the last dimension, as indices
    into the flat ids, without padding."""
    if not ids.ndim:
        raise no_sequence()
    flat = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    partition = Partition(ids.size(-1), gang.size)
    blocks = []
    for rank in range(gang.size):
        own = partition.shard(rank)
        block = flat[..., own.start : own.stop].flatten()
        blocks.append(block if valid is None else block[valid.flatten()[block]])
    return blocks
