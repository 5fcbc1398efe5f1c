"""Estimates the traffic and memory of a micro-batch's lookup, by strategy: the arithmetic of
:mod:`tp_embed.lookup.exchange`, for the rank that sends the most and the rank that needs the most
memory.

The lookup has N ids, U of them distinct. With ``output="sequence"`` rank q wants the :math:`N_q`
ids of its block, :math:`U_q` of them distinct. B is :math:`\\lceil E/P\\rceil`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from tp_embed.partition import Partition

from .setup import ITEM_BYTES, Setup, Strategy, sharers
from .tokens import distinct, distinct_of_block, largest_owner, rows_of_owners
from .traffic import Operation, Phase, Transfer

# Above this share of distinct ids, `dedup="auto"` does not de-duplicate the exchange of columns.
WORTH_SHARE = 0.85


@dataclass(frozen=True)
class Lookup(ABC):
    """The lookups of a step, in a table cut over several ranks."""

    setup: Setup
    dedup: bool

    @abstractmethod
    def transfers(self) -> Iterator[Transfer]: ...

    @property
    @abstractmethod
    def items(self) -> int:
        """The peak number of items in the forward of a micro-batch, its output included."""

    @property
    def kept(self) -> int:
        """The items that :class:`tp_embed.lookup.exchange.Staging` keeps on a CPU."""
        return 0

    @cached_property
    def columns(self) -> Partition:
        return Partition(self.setup.embed_dim, self.setup.tp_size)

    @cached_property
    def blocks(self) -> Partition:
        """The positions that each rank wants, if each wants its own block."""
        return Partition(self.setup.tokens, self.setup.tp_size)

    def wanted(self, rank: int) -> int:
        """Returns the number of rows sent to ``rank``, if each wants its own block."""
        count = len(self.blocks.shard(rank))
        return distinct_of_block(self.setup, count) if self.dedup else count

    @cached_property
    def wanted_by_all(self) -> int:
        """The sum of :meth:`wanted` over all ranks."""
        return self.sum_over_blocks(self.wanted)

    def sum_over_blocks(self, function: Callable[[int], int]) -> int:
        """Sums ``function`` over all ranks. It must depend on the size of their blocks only."""
        full, rest = divmod(self.setup.tokens, self.blocks.block)
        return full * function(0) + (function(full) if rest else 0)

    def send(self, phase: Phase, operation: Operation, items: int) -> Transfer:
        setup = self.setup
        payload, times = items * ITEM_BYTES[setup.dtype], setup.accumulation_steps
        return Transfer("table", phase, operation, "tp", setup.tp_size, payload, times)


class ColumnsToAll(Lookup):
    """Cut over the columns; all ranks want whole rows: an all-gather."""

    def transfers(self) -> Iterator[Transfer]:
        yield self.send("forward", "all_gather", self._rows * self.columns.block)

    @property
    def items(self) -> int:
        width, dim = self.setup.tp_size * self.columns.block, self.setup.embed_dim
        # The gathered blocks, the concatenated rows, and a copy without padding.
        return self.kept + self.setup.tokens * (width + (dim if width > dim else 0))

    @property
    def kept(self) -> int:
        return self._rows * self.setup.tp_size * self.columns.block

    @property
    def _rows(self) -> int:
        return distinct(self.setup) if self.dedup else self.setup.tokens


class ColumnsToBlocks(Lookup):
    """Cut over the columns; each rank wants whole rows of a block of positions: an all-to-all."""

    def transfers(self) -> Iterator[Transfer]:
        dim, ends = self.setup.embed_dim, {*_ends(self.columns), *_ends(self.blocks)}

        def width(rank: int) -> int:
            return len(self.columns.shard(rank))

        # Among ranks with equal blocks, those that want the fewest rows send the most.
        to_others = max(width(r) * (self.wanted_by_all - self.wanted(r)) for r in ends)
        yield self.send("forward", "all_to_all", to_others)
        gradients = max(len(self.blocks.shard(r)) * (dim - width(r)) for r in ends)
        yield self.send("backward", "all_to_all", gradients)

    @property
    def items(self) -> int:
        width, dim = self.setup.tp_size * self.columns.block, self.setup.embed_dim
        received = self.wanted(0) * (dim + (width if width > dim else 0))  # As sent, and padded.
        output = self.blocks.block * (width + (dim if width > dim else 0))
        return self.wanted_by_all * self.columns.block + received + output

    @property
    def kept(self) -> int:
        dim, width = self.setup.embed_dim, self.columns.block
        sent = max(self.wanted_by_all * width, self.blocks.block * dim)
        return sent + max(self.wanted(0) * dim, self.setup.tokens * width)


class RowsToAll(Lookup):
    """Cut over the vocabulary; all ranks want all rows: an all-reduce, or an all-gather of rows."""

    def transfers(self) -> Iterator[Transfer]:
        dim, rows = self.setup.embed_dim, distinct(self.setup)
        if not self.dedup:
            yield self.send("forward", "all_reduce", self.setup.tokens * dim)
        elif self._is_uneven:
            yield self.send("forward", "all_to_all", self._moved() * dim)
            even = Partition(rows, self.setup.tp_size).block
            yield self.send("forward", "all_gather", even * dim)
        else:
            yield self.send("forward", "all_gather", largest_owner(self.setup, rows) * dim)

    @property
    def items(self) -> int:
        return self.kept + self.setup.tokens * self.setup.embed_dim

    @property
    def kept(self) -> int:
        if not self.dedup:
            return 0
        rows = distinct(self.setup)
        rows += largest_owner(self.setup, rows) if self._is_uneven else 0
        return rows * self.setup.embed_dim

    @property
    def _is_uneven(self) -> bool:
        """Whether one owner has so many rows that they are first rebalanced over the ranks."""
        size, rows = self.setup.tp_size, distinct(self.setup)
        return size > 2 and largest_owner(self.setup, rows) * (size - 1) > rows

    def _moved(self) -> int:
        """Returns the most rows that an owner sends away to balance the ranks."""
        rows = distinct(self.setup)
        even = Partition(rows, self.setup.tp_size)
        held = pairwise((0, *accumulate(rows_of_owners(self.setup, rows))))
        parts = ((start, stop, even.shard(rank)) for rank, (start, stop) in enumerate(held))
        return max(
            stop - start - max(0, min(stop, part.stop) - max(start, part.start))
            for start, stop, part in parts
        )


class RowsToBlocks(Lookup):
    """Cut over the vocabulary; each rank wants a block of positions."""

    def transfers(self) -> Iterator[Transfer]:
        setup, most = self.setup, self.blocks.block
        dim, size = setup.embed_dim, setup.tp_size
        if self.dedup:
            # To all others; the last one wants the least.
            rows = self.sum_over_blocks(self._owned) - self._owned(size - 1)
            yield self.send("forward", "all_to_all", rows * dim)
        else:
            yield self.send("forward", "reduce_scatter", size * most * dim)
        if self.dedup or setup.device == "cpu":
            # Minus the rows a rank owns itself, at the rank that owns the fewest.
            least = (most - largest_owner(setup, most)) // (size - 1)
            yield self.send("backward", "all_to_all", (most - least) * dim)
        else:
            yield self.send("backward", "all_gather", most * dim)

    @property
    def items(self) -> int:
        most = self.blocks.block
        if not self.dedup:
            copies = 2 if self.setup.device == "cpu" else 1  # Gloo makes a copy.
            return (copies * self.setup.tp_size + 1) * most * self.setup.embed_dim
        rows = self.sum_over_blocks(self._owned) + self.wanted(0) + most
        return rows * self.setup.embed_dim

    @property
    def kept(self) -> int:
        sent, received = self.blocks.block, largest_owner(self.setup, self.setup.tokens)
        if self.dedup:
            sent = max(sent, self.sum_over_blocks(self._owned))
            received = max(received, self.wanted(0))
        return (sent + received) * self.setup.embed_dim

    def _owned(self, rank: int) -> int:
        """Returns the most rows wanted by ``rank`` that one rank owns."""
        return largest_owner(self.setup, self.wanted(rank))


class RowsToOwn(Lookup):
    """Cut over the vocabulary and all ranks; each wants the rows of ids of its own."""

    def transfers(self) -> Iterator[Transfer]:
        held = rows_of_owners(self.setup, self._rows, "world")
        least = held[-1] if len(held) == self._ranks else 0
        others, row = self._ranks - 1, self.setup.embed_dim * ITEM_BYTES[self.setup.dtype]
        yield self._send("ids", "forward", 32 * others)  # How many there are.
        yield self._send("ids", "forward", 4 * (self._rows - least))
        yield self._send("table", "forward", others * held[0] * row)
        yield self._send("table", "backward", (self._rows - least) * row)

    def _send(self, name: str, phase: Phase, payload: int) -> Transfer:
        times = self.setup.accumulation_steps
        return Transfer(name, phase, "all_to_all", "world", self._ranks, payload, times)

    @property
    def items(self) -> int:
        return (self._given + self._rows + self.setup.tokens) * self.setup.embed_dim

    @property
    def kept(self) -> int:
        return (self._given + max(self._given, self._rows)) * self.setup.embed_dim

    @property
    def _given(self) -> int:
        """The most rows that one rank gives to all, itself included."""
        return self._ranks * largest_owner(self.setup, self._rows, "world")

    @property
    def _ranks(self) -> int:
        return sharers(self.setup, "world")

    @property
    def _rows(self) -> int:
        return distinct(self.setup) if self.dedup else self.setup.tokens


class NotCut(Lookup):
    """Each rank holds the whole table. With sequence output, a model keeps its block of the output,
    and gathers the gradients of all blocks, as in Megatron-LM's
    ``scatter_to_sequence_parallel_region``."""

    def transfers(self) -> Iterator[Transfer]:
        if self.setup.output == "sequence":
            items = self.blocks.block * self.setup.embed_dim
            yield self.send("backward", "all_gather", items)

    @property
    def items(self) -> int:
        return self.setup.tokens * self.setup.embed_dim


_KINDS: dict[tuple[Strategy, str], type[Lookup]] = {
    ("embed", "replicated"): ColumnsToAll,
    ("embed", "sequence"): ColumnsToBlocks,
    ("vocab", "replicated"): RowsToAll,
    ("vocab", "sequence"): RowsToBlocks,
    ("world", "replicated"): RowsToOwn,
}


def lookup_of(setup: Setup, strategy: Strategy, dedup: bool) -> Lookup:
    """Returns the lookup for the strategy and output of ``setup``."""
    if sharers(setup, strategy) == 1:
        return NotCut(setup, False)
    return _KINDS.get((strategy, setup.output), NotCut)(setup, dedup)


def auto_dedup(setup: Setup, strategy: Strategy) -> bool:
    """Returns what ``dedup="auto"`` chooses. On an accelerator it never de-duplicates, since
    counting distinct ids would synchronise, except where ranks exchange counts anyway."""
    if strategy == "world":
        return True
    if strategy == "none" or setup.device != "cpu" or setup.tp_size == 1:
        return False
    if strategy == "vocab":
        return True
    lookup = ColumnsToBlocks(setup, True)
    rows = lookup.wanted_by_all if setup.output == "sequence" else distinct(setup)
    return rows <= WORTH_SHARE * setup.tokens


def _ends(partition: Partition) -> set[int]:
    """Returns the last rank with a full block, and the rank after it, with a shorter one."""
    last = partition.size // partition.block - 1
    return {last, min(last + 1, partition.num_shards - 1)}
