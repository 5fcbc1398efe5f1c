"""Estimates the distinct tokens of a micro-batch, and the ranks that hold their rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from .setup import ITEM_BYTES, Setup, Strategy, block, shape, sharers


def distinct(setup: Setup) -> int:
    """Returns U, the number of distinct tokens among the N of a micro-batch. Without a given share,
    assumes Zipf's law, which overestimates it for real text."""
    if setup.unique_share is None:
        found = round(zipf_distinct(setup.vocab_size, setup.tokens))
    else:
        found = _part(setup.unique_share, setup.tokens)
    return max(1, min(found, setup.tokens, setup.vocab_size))


def distinct_of_batches(setup: Setup, count: int) -> int:
    """Returns the number of distinct tokens of ``count`` micro-batches: by Zipf's law, or by Heaps'
    law from the share of one, which is too many for text: 1.3 times for 4 batches, 1.7 for 16."""
    tokens = count * setup.tokens
    if count == 1:
        return distinct(setup)
    if setup.unique_share is None:
        found = round(zipf_distinct(setup.vocab_size, tokens))
    elif setup.tokens == 1:
        found = tokens
    else:
        found = round(distinct(setup) ** (math.log(tokens) / math.log(setup.tokens)))
    return max(1, min(found, tokens, setup.vocab_size))


def rows_in_use(setup: Setup, strategy: Strategy, count: int) -> int:
    """Returns the most rows of a shard that ``count`` micro-batches use together."""
    rows = distinct_of_batches(setup, count)
    if strategy in ("vocab", "world"):
        rows = min(largest_owner(setup, rows, strategy), block(setup, strategy))
    return rows


def distinct_of_block(setup: Setup, count: int) -> int:
    """Returns the number of distinct tokens among ``count`` consecutive ones. Without a given
    share, assumes Heaps' law, :math:`n^\\beta` of n tokens (Heaps, "Information Retrieval", 1978),
    with the :math:`\\beta` of all N."""
    whole = distinct(setup)
    if count in (0, setup.tokens):
        return whole if count else 0
    if setup.block_unique_share is not None:
        found = _part(setup.block_unique_share, count)
    else:
        found = round(whole ** (math.log(count) / math.log(setup.tokens)))
    return max(1, min(found, count, whole))


def largest_owner(setup: Setup, rows: int, strategy: Strategy = "vocab") -> int:
    """Returns the most of ``rows`` distinct rows on one rank, for a table cut over its rows."""
    even = -(-rows // sharers(setup, strategy))
    if setup.owner_share is None or (strategy == "world" and setup.placement == "cyclic"):
        return even
    return max(even, _part(setup.owner_share, rows))


def rows_of_owners(setup: Setup, rows: int, strategy: Strategy = "vocab") -> list[int]:
    """Returns the number of ``rows`` on each rank, up to the last with any. The first has the most,
    since small ids are frequent; the others share the rest evenly."""
    first, others = largest_owner(setup, rows, strategy), sharers(setup, strategy) - 1
    each, more = divmod(rows - first, max(others, 1))
    others = others if each else more
    return [first, *(each + (i < more) for i in range(others))]


def sparse_bytes(setup: Setup, strategy: Strategy) -> int:
    """Returns the bytes of the sparse gradient of a micro-batch, for a shard that may hold the rows
    of all tokens."""
    if strategy == "world":
        rows = rows_in_use(setup, strategy, setup.dp_size)
    else:
        rows = min(distinct(setup), shape(setup, strategy)[0])
    width = shape(setup, strategy)[1]
    return rows * (8 + width * ITEM_BYTES[setup.dtype])


@lru_cache
def zipf_distinct(vocab_size: int, tokens: int) -> float:
    """Returns the expected number of distinct ids among ``tokens`` draws, where the r-th of V ids
    has a probability proportional to 1/r (Zipf, "The Psycho-Biology of Language", 1935)."""
    return _distinct_of_frequent(vocab_size, vocab_size, tokens)


def zipf_owner_share(vocab_size: int, tokens: int, owners: int) -> float:
    """Returns the part of the distinct ids among ``tokens`` draws by Zipf's law that the first of
    ``owners`` ranks holds, if each has a block of ids and frequent ids come first."""
    first = -(-vocab_size // owners)
    return _distinct_of_frequent(first, vocab_size, tokens) / zipf_distinct(vocab_size, tokens)


def _distinct_of_frequent(ids: int, vocab_size: int, tokens: int) -> float:
    """Returns the expected number of the ``ids`` most frequent ids among ``tokens`` draws."""
    if vocab_size == 1:
        return 1.0
    total = sum(count / rank for rank, count in _ranks(vocab_size))
    return sum(
        count * -math.expm1(tokens * math.log1p(-1 / (rank * total))) for rank, count in _ranks(ids)
    )


def _ranks(vocab_size: int) -> Iterator[tuple[float, int]]:
    """Yields ranks with counts. Groups r/256 neighbours of a high rank r to bound the work."""
    first = 1
    while first <= vocab_size:
        count = min(max(1, first >> 8), vocab_size - first + 1)
        yield first + (count - 1) / 2, count
        first += count


def _part(share: float, count: int) -> int:
    return math.ceil(share * count - 1e-9)  # 0.1 * 30 is slightly more than 3.
