"""Published hash functions that map token n-grams to rows of a table."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tp_embed.lookup.ids import as_indices


@dataclass
class NGramCache:
    """Keeps what a layer needs to know about earlier tokens, to decode step by step. Starts empty;
    each call that it is passed to updates it.

    :param ids: the last ids. *Shape:* :math:`(*,C)`, where C is less than the largest n.
    :param values: the last inputs of the convolution of an :class:`~tp_embed.nn.ngram.NGramGate`.
    """

    ids: Tensor | None = None
    values: Tensor | None = None


class NGramHash(ABC):
    """Maps the n-grams that end at each token to rows of one table, for n = 2, ..., ``max_ngram``.

    For each n there are several *heads*: hash functions with rows of their own. n-grams that share
    a row in one head rarely do in all. Nothing resolves collisions, as published.

    :param vocab_size: the token ids are in [0, ``vocab_size``).
    :param sizes: the number of rows of each head, for each n.
    :param boundary: the id that ends a document, and belongs to it. n-grams don't reach across it.
    :param fill: stands for tokens before the beginning of a document.
    """

    def __init__(
        self,
        vocab_size: int,
        sizes: Sequence[Sequence[int]],
        *,
        boundary: int | None = None,
        fill: int = 0,
    ) -> None:
        for name, value in (("boundary", boundary), ("fill", fill)):
            if value is not None and not 0 <= value < vocab_size:
                raise ValueError(
                    f"`{name}` must be a token id in [0, {vocab_size}) (vocab_size), but is "
                    f"{value} instead."
                )
        if not sizes or not all(sizes) or min(map(min, sizes)) < 1:
            raise ValueError(
                "`sizes` must have at least one head for each n from 2, each with at least one "
                f"row, but is {[list(heads) for heads in sizes]} instead. Use `max_ngram` of 2 or "
                "more, and `heads` of 1 or more."
            )
        self.vocab_size, self.boundary, self.fill = vocab_size, boundary, fill
        self.sizes = tuple(map(tuple, sizes))

    @property
    def max_ngram(self) -> int:
        """The largest n."""
        return len(self.sizes) + 1

    @property
    def num_heads(self) -> int:
        """H, the number of heads, and of rows for each token."""
        return sum(map(len, self.sizes))

    @property
    def num_rows(self) -> int:
        """The number of rows of the table: the heads' rows, one head after the other."""
        return sum(map(sum, self.sizes))

    def rows(
        self, ids: Tensor, cache: NGramCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Returns the rows of the n-grams that end at each token. Needs no synchronization with an
        accelerator.

        :param ids: the token ids. *Shape:* :math:`(*,S)`. *Dtype:* any integer.
        :param cache: holds the tokens before ``ids``; updated.
        :param positions: the position of each token within its document, for documents that are
            packed without ``boundary``. *Shape:* as ``ids``, or broadcastable to it.
        :returns: the rows, or -1 for a token outside ``[0, vocab_size)``. *Shape:*
            :math:`(*,S,H)`. *Dtype:* int64.
        """
        ids = as_indices(ids).long()
        past = None if cache is None else cache.ids
        history = ids if past is None else torch.cat([past, ids], dim=-1)
        if cache is not None:
            cache.ids = history[..., max(0, history.size(-1) - self.max_ngram + 1) :].clone()
        ages = self._ages(history)[..., history.size(-1) - ids.size(-1) :]
        if positions is not None:
            ages = torch.minimum(ages, as_indices(positions))
        tokens = [self._earlier(history, ages, shift) for shift in range(self.max_ngram)]
        rows = ids.new_empty(*ids.shape, self.num_heads)
        first = 0
        sizes = (size for heads in self.sizes for size in heads)
        for head, (hashed, size) in enumerate(zip(self._hashes(tokens), sizes, strict=True)):
            rows[..., head] = hashed + first
            first += size
        bad = (ids < 0) | (ids >= self.vocab_size)
        return rows.masked_fill_(bad.unsqueeze(-1), -1)

    def _ages(self, history: Tensor) -> Tensor:
        """Returns how many tokens of its document come before each token. *Shape:* :math:`(S)`, or
        as ``history``."""
        length = history.size(-1)
        places = torch.arange(length, device=history.device)
        if self.boundary is None or not length:
            return places
        following = torch.where(history == self.boundary, places + 1, 0).cummax(dim=-1).values
        return places - pad(following[..., :-1], (1, 0))

    def _earlier(self, history: Tensor, ages: Tensor, shift: int) -> Tensor:
        """Returns the token that is ``shift`` before each of the last ones, or ``fill``."""
        length, count = history.size(-1), ages.size(-1)
        if not shift:
            return history[..., length - count :]
        shifted = pad(history, (shift, 0), value=self.fill)[..., length - count : length]
        return torch.where(ages >= shift, shifted, self.fill)

    @abstractmethod
    def _hashes(self, tokens: list[Tensor]) -> Iterator[Tensor]:
        """Yields the rows within each head.

        :param tokens: the tokens, the tokens one position before, and so on.
        """

    def __repr__(self) -> str:
        boundary = "" if self.boundary is None else f", boundary={self.boundary}"
        return f"{type(self).__name__}({self.vocab_size}, {self.num_rows} rows{boundary})"


class XorHash(NGramHash):
    r"""The hash function of `Engram <https://arxiv.org/abs/2601.07372>`_, from DeepSeek, and of
    Qwen4-Exp: :math:`(t_0 m_0 \oplus t_1 m_1 \oplus \ldots) \bmod p`, where :math:`t_i` is the
    token i positions before, :math:`m_i` an odd number, and p a prime, another one for each head.

    The primes are the first ones from ``base_size``. Several layers with tables of their own have
    distinct primes and multipliers: give them ``layer`` 0, 1, ...

    :param vocab_size: the number of token ids. Engram first maps tokens that differ only in case,
        accents or spaces to one id; do so before, and give the number of such ids.
    :param base_size: the least number of rows of a head, or one for each n.
    :param max_ngram: the largest n.
    :param heads: the number of heads for each n.
    :param layer: which layer with n-grams this is, from 0.
    :param seed: for the multipliers, as in Qwen4-Exp, which draws them by SplitMix64.
    :param multipliers: the multipliers, if they are drawn otherwise, as Engram does by NumPy.
    :param boundary: as in :class:`NGramHash`; Engram has none.
    :param fill: as in :class:`NGramHash`; ``boundary`` by default.
    """

    def __init__(
        self,
        vocab_size: int,
        base_size: int | Sequence[int],
        *,
        max_ngram: int = 3,
        heads: int = 8,
        layer: int = 0,
        seed: int = 1234,
        multipliers: Sequence[int] | None = None,
        boundary: int | None = None,
        fill: int | None = None,
    ) -> None:
        if fill is None:
            if boundary is None:
                raise ValueError(
                    "`fill` must be given without a `boundary`: the id that stands for tokens "
                    "before the first one, such as the padding id."
                )
            fill = boundary
        orders = max(0, max_ngram - 1)
        bases = [base_size] * orders if isinstance(base_size, int) else list(base_size)
        if len(bases) != orders or min(bases, default=1) < 1:
            raise ValueError(
                f"`base_size` must be a positive number, or {orders} of them, one for each n up to "
                f"{max_ngram} (max_ngram), but is {base_size} instead."
            )
        sizes = _distinct_primes(bases, heads, layer)
        super().__init__(vocab_size, sizes, boundary=boundary, fill=fill)
        drawn = _odd_numbers(vocab_size, max_ngram, layer, seed)
        self.multipliers = tuple(drawn if multipliers is None else map(int, multipliers))
        if len(self.multipliers) != max_ngram:
            raise ValueError(
                f"`multipliers` must have {max_ngram} numbers (max_ngram), but has "
                f"{len(self.multipliers)} instead."
            )

    def _hashes(self, tokens: list[Tensor]) -> Iterator[Tensor]:
        mixed = tokens[0] * self.multipliers[0]
        for token, multiplier, heads in zip(
            tokens[1:], self.multipliers[1:], self.sizes, strict=True
        ):
            mixed = mixed ^ (token * multiplier)
            for size in heads:
                yield mixed % size


class RollingHash(NGramHash):
    r"""The hash function of `LongCat-Flash-Lite <https://arxiv.org/abs/2601.21204>`_:
    :math:`(t_0 + t_1 V + t_2 V^2 + \ldots) \bmod m`, where :math:`t_i` is the token i positions
    before, or 0 before the beginning of a document, and V the number of token ids.

    The heads have ``base_size`` + 1, + 3, + 5, ... rows.

    :param vocab_size: V, the number of token ids.
    :param base_size: one less than the rows of the first head; a multiple of V as published.
    :param max_ngram: the largest n.
    :param heads: the number of heads for each n.
    :param boundary: as in :class:`NGramHash`.
    """

    def __init__(
        self,
        vocab_size: int,
        base_size: int,
        *,
        max_ngram: int = 4,
        heads: int = 4,
        boundary: int | None = None,
    ) -> None:
        firsts = range(0, heads * (max_ngram - 1), max(1, heads))
        sizes = [[base_size + 2 * (first + i) + 1 for i in range(heads)] for first in firsts]
        super().__init__(vocab_size, sizes, boundary=boundary)
        if max_ngram * vocab_size * max(map(max, sizes)) >= 1 << 63:
            raise ValueError(
                f"`base_size` must be so small that hashes fit into 64 bits, but is {base_size} "
                f"with {vocab_size} token ids (vocab_size) and n up to {max_ngram} instead. Use a "
                "smaller one."
            )

    def _hashes(self, tokens: list[Tensor]) -> Iterator[Tensor]:
        for n, heads in enumerate(self.sizes, start=2):
            for size in heads:
                total, power = tokens[0], 1
                for token in tokens[1:n]:
                    power = power * self.vocab_size % size  # Reduced, so that nothing overflows.
                    total = total + token * power
                yield total % size


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _split_mix(value: int) -> int:
    """SplitMix64, https://doi.org/10.1145/2714064.2660195."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _odd_numbers(vocab_size: int, count: int, layer: int, seed: int) -> list[int]:
    """Returns multipliers so small that products with ids fit into int64."""
    bound = max(1, ((1 << 63) - 1) // vocab_size // 2)
    first = seed + 10007 * layer
    draws = ((first + _GOLDEN * (i + 1)) & _MASK for i in range(count))
    return [2 * (_split_mix(draw) % bound) + 1 for draw in draws]


def _distinct_primes(bases: Sequence[int], heads: int, layer: int) -> list[list[int]]:
    """Returns the primes of a layer, for each n: for each head the next one from the base that no
    head of this or an earlier layer has."""
    seen: set[int] = set()
    found: list[list[int]] = []
    for _ in range(layer + 1):
        found = []
        for base in bases:
            found.append([])
            prime = base - 1
            for _ in range(heads):
                prime = _next_prime(prime, seen)
                seen.add(prime)
                found[-1].append(prime)
    return found


def _next_prime(number: int, seen: set[int]) -> int:
    number += 1
    while number in seen or not _is_prime(number):
        number += 1
    return number


def _is_prime(number: int) -> bool:
    if number < 4:
        return number > 1
    return number % 2 > 0 and all(number % d for d in range(3, math.isqrt(number) + 1, 2))
