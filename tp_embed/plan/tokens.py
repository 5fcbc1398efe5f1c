"""How many of the tokens of a micro-batch are distinct, and who holds their rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from .setup import ITEM_BYTES, Setup, Strategy, block


def distinct(setup: Setup) -> int:
    """U, the distinct ones among the N tokens of a micro-batch; what is not known is taken to be as
    if they were drawn by Zipf's law, of which real text has fewer."""
    if setup.unique_share is None:
        found = round(zipf_distinct(setup.vocab_size, setup.tokens))
    else:
        found = _part(setup.unique_share, setup.tokens)
    return max(1, min(found, setup.tokens, setup.vocab_size))


def distinct_of_block(setup: Setup, count: int) -> int:
    """The distinct ones among ``count`` of the tokens, one after the other. What is not known is by
    Heaps' law, :math:`n^\\beta` of n tokens (Heaps, "Information Retrieval", 1978), with the
    :math:`\\beta` of all N."""
    whole = distinct(setup)
    if count in (0, setup.tokens):
        return whole if count else 0
    if setup.block_unique_share is not None:
        found = _part(setup.block_unique_share, count)
    else:
        found = round(whole ** (math.log(count) / math.log(setup.tokens)))
    return max(1, min(found, count, whole))


def largest_owner(setup: Setup, rows: int) -> int:
    """How many of ``rows`` distinct ones are on one rank at most, of a table that is cut over its
    rows."""
    if setup.owner_share is None:
        return -(-rows // setup.tp_size)
    return min(rows, _part(setup.owner_share, rows))


def rows_of_owners(setup: Setup, rows: int) -> list[int]:
    """How many each rank holds, up to the last that holds any: the first one the most, for small
    ids are the frequent ones, and the others alike."""
    first = largest_owner(setup, rows)
    each, more = divmod(rows - first, max(setup.tp_size - 1, 1))
    others = setup.tp_size - 1 if each else more
    return [first, *(each + (i < more) for i in range(others))]


def sparse_bytes(setup: Setup, strategy: Strategy) -> int:
    """Of the sparse gradient of a micro-batch; the largest shard may have rows for all tokens."""
    rows = distinct(setup)
    if strategy == "vocab":
        rows = min(rows, block(setup, "vocab"))
    width = block(setup, "embed") if strategy == "embed" else setup.embed_dim
    return rows * (8 + width * ITEM_BYTES[setup.dtype])


@lru_cache
def zipf_distinct(vocab_size: int, tokens: int) -> float:
    """The distinct ones to be expected among ``tokens`` of which the r-th of V classes has a
    probability in proportion to 1/r (Zipf, "The Psycho-Biology of Language", 1935)."""
    if vocab_size == 1:
        return 1.0
    total = sum(count / rank for rank, count in _ranks(vocab_size))
    return sum(
        count * -math.expm1(tokens * math.log1p(-1 / (rank * total)))
        for rank, count in _ranks(vocab_size)
    )


def _ranks(vocab_size: int) -> Iterator[tuple[float, int]]:
    """Ranks and how many there are like them: of high ones 1/256 are taken together."""
    first = 1
    while first <= vocab_size:
        count = min(max(1, first >> 8), vocab_size - first + 1)
        yield first + (count - 1) / 2, count
        first += count


def _part(share: float, count: int) -> int:
    return math.ceil(share * count - 1e-9)  # Not 4 for 0.1 x 30, which is a bit more than 3.
