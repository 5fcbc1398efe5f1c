"""Embeddings of token n-grams in a hashed table, and how models add them to hidden states."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.nn.functional import pad, rms_norm, silu

from tp_embed.gang import Gang
from tp_embed.nn.embedding import (
    RowWiseEmbedding,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.nn.ngram_hash import NGramCache, NGramHash

_CLASSES: dict[str, Any] = {
    "embed": ShardedEmbedding,
    "vocab": VocabShardedEmbedding,
    "world": RowWiseEmbedding,
}


class NGramEmbedding(Module):
    """Embeds the n-grams that end at each token: looks up a row for each head of ``hashing`` in one
    table, :attr:`table`, and returns them side by side.

    The table is whole, or sharded over ``gang``; the results are the same. A whole one can be
    sharded later like any other, by :func:`tp_embed.shard_embeddings` or by the section of a
    DeepSpeed config, ``{"rules": {"*ngram*": "world"}}`` if the module is called ``ngram``. A
    lookup sends what the table's class sends, for H ids per token.

    :param hashing: says which rows n-grams have.
    :param embed_dim: E, the size of a row.
    :param gang: the gang to shard the table over; if ``None``, the table is whole.
    :param strategy: how to shard it: ``"world"`` makes a :class:`~tp_embed.RowWiseEmbedding`, where
        each rank has tokens of its own, ``"vocab"`` a :class:`~tp_embed.VocabShardedEmbedding` and
        ``"embed"`` a :class:`~tp_embed.ShardedEmbedding`, where all ranks have the same.
    :param pad_to_multiple_of: adds rows that no n-gram has, up to a multiple of this number.
    :param options: keyword arguments of the table's class: ``sparse``, ``init_fn``, ``device``,
        ``dtype``, ``placement`` and others. Not ``output``.
    :raises ValueError: ``strategy`` is unknown, or an option has an invalid value.
    """

    table: Module

    def __init__(
        self,
        hashing: NGramHash,
        embed_dim: int,
        gang: Gang | None = None,
        *,
        strategy: Literal["embed", "vocab", "world"] = "world",
        pad_to_multiple_of: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if strategy not in _CLASSES:
            raise ValueError(
                f"`strategy` must be one of {tuple(_CLASSES)}, but is {strategy!r} instead. For a "
                "whole table leave out `gang`."
            )
        self.hashing, self.embed_dim = hashing, embed_dim
        num_rows = math.ceil(hashing.num_rows / pad_to_multiple_of) * pad_to_multiple_of
        if gang is None:
            self.table = StandardEmbedding(num_rows, embed_dim, **options)
        else:
            self.table = _CLASSES[strategy](gang, num_rows, embed_dim, **options)

    @property
    def width(self) -> int:
        """H E, the size of the output for a token."""
        return self.hashing.num_heads * self.embed_dim

    def forward(
        self, ids: Tensor, cache: NGramCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """
        :param ids: the token ids. *Shape:* :math:`(*,S)`. *Dtype:* any integer.
        :param cache: has the tokens before ``ids``, in step-by-step decoding; updated.
        :param positions: the position of each token within its document, for documents that are
            packed without the hash's boundary. *Shape:* as ``ids``, or broadcastable to it.
        :returns: the rows of all heads side by side, beginning with n = 2. *Shape:*
            :math:`(*,S,H E)`.
        :raises IndexError: an id is outside ``[0, vocab_size)`` of the hash. All ranks raise; on an
            accelerator, up to two calls later.
        :raises ValueError: the table was sharded with an ``output`` other than "replicated".
        """
        output = getattr(self.table, "output", "replicated")
        if output not in ("replicated", "own"):
            raise ValueError(
                "`output` must be 'replicated' for the table of an `NGramEmbedding`, whose last "
                f"dimension of ids are the heads, but is {output!r} instead. Give the table the "
                "rule 'world' or 'none', or leave out `output`."
            )
        try:
            found: Tensor = self.table(self.hashing.rows(ids, cache, positions))
        except IndexError as e:
            raise IndexError(
                f"All token ids must be in [0, {self.hashing.vocab_size}) (`vocab_size` of the "
                "hash), but some are not: their n-grams have the row -1. Check the tokenizer "
                f"against the hash. The table says: {e}"
            ) from e
        return found.flatten(-2)

    def extra_repr(self) -> str:
        return str(self.hashing)


class NGramAverage(Module):
    """Averages each token's hidden state with its n-grams, each projected by its head's matrix, as
    `LongCat-Flash-Lite <https://arxiv.org/abs/2601.21204>`_ does with the embeddings of tokens:
    :math:`(x + \\sum_h W_h e_h) / (1 + H)`.

    The matrices are :attr:`projection`, side by side.

    :param ngrams: embeds the n-grams.
    :param hidden_size: the size of a hidden state.
    """

    def __init__(
        self,
        ngrams: NGramEmbedding,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ngrams = ngrams
        self.projection = nn.Linear(
            ngrams.width, hidden_size, bias=False, device=device, dtype=dtype
        )

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        cache: NGramCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """
        :param x: the hidden states. *Shape:* :math:`(*,S,hidden)`.
        :param ids: the token ids, :math:`(*,S)`; ``cache`` and ``positions`` as in
            :class:`NGramEmbedding`.
        :returns: the new hidden states. *Shape:* as ``x``.
        """
        found = self.projection(self.ngrams(ids, cache, positions))
        averaged: Tensor = (x + found) / (1 + self.ngrams.hashing.num_heads)
        return averaged


class NGramGate(Module):
    """Adds the n-grams of each token to its hidden state, weighted by a gate that depends on both,
    as DeepSeek's `Engram <https://arxiv.org/abs/2601.07372>`_ and Qwen4-Exp do.

    The gate is the sigmoid of s, where :math:`s |s|` is the product of the normalized hidden state
    and a normalized projection of the n-grams, divided by the square root of ``hidden_size``. It
    multiplies another projection of the n-grams. With the result v, the new hidden state is
    :math:`x + v + silu(conv(norm(v)))`. The convolution is causal and channel by channel, over
    ``kernel_size`` tokens that are as far apart as the largest n. Its weight is zero at first. It
    reaches across the ends of documents, as published.

    With several residual streams, ``x`` has the hidden states of all streams side by side, and each
    stream has a gate.

    :param ngrams: embeds the n-grams.
    :param hidden_size: the size of the hidden state of a stream.
    :param streams: the number of residual streams.
    :param kernel_size: the number of tokens that the convolution sees.
    :param bias: whether the projections have a bias, as in DeepSeek's code; not in Qwen4-Exp.
    :param eps: added to mean squares by the norms. (Qwen4-Exp stores the weights of norms less 1.)
    """

    def __init__(
        self,
        ngrams: NGramEmbedding,
        hidden_size: int,
        *,
        streams: int = 1,
        kernel_size: int = 4,
        bias: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: Any = {"device": device, "dtype": dtype}
        channels = streams * hidden_size
        self.ngrams, self.hidden_size = ngrams, hidden_size
        self.key = nn.Linear(ngrams.width, channels, bias=bias, **place)
        self.value = nn.Linear(ngrams.width, hidden_size, bias=bias, **place)
        self.norm_key = _StreamNorm(streams, hidden_size, eps, **place)
        self.norm_query = _StreamNorm(streams, hidden_size, eps, **place)
        self.norm_conv = _StreamNorm(streams, hidden_size, eps, **place)
        self.conv = nn.Conv1d(
            channels,
            channels,
            kernel_size,
            groups=channels,
            dilation=ngrams.hashing.max_ngram,
            bias=False,
            **place,
        )
        nn.init.zeros_(self.conv.weight)

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        cache: NGramCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """
        :param x: the hidden states. *Shape:* :math:`(*,S,streams\\cdot hidden)`.
        :param ids: the token ids, :math:`(*,S)`; ``cache`` and ``positions`` as in
            :class:`NGramEmbedding`.
        :param mask: false where there is padding, which then adds nothing, and counts as the end of
            a document. *Shape:* as ``ids``. *Dtype:* bool.
        :returns: the new hidden states. *Shape:* as ``x``.
        """
        hashing = self.ngrams.hashing
        if mask is not None:
            if hashing.boundary is None:
                raise ValueError(
                    "`mask` must be left out without a `boundary` of the hash, the id that padding "
                    "gets, but is given. Make the hash with `boundary=`."
                )
            ids = torch.where(mask, ids, hashing.boundary)
        found = self.ngrams(ids, cache, positions)
        key, query = self.norm_key(self.key(found)), self.norm_query(x)
        streams = key.size(-1) // self.hidden_size  # `-1` fails where there are no tokens.
        parts = (key * query).unflatten(-1, (streams, self.hidden_size))
        products = parts.sum(dim=-1, keepdim=True)
        gate = products / math.sqrt(self.hidden_size)
        gate = (gate.abs().clamp_min(1e-6).sqrt() * gate.sign()).sigmoid()
        value = (gate * self.value(found).unsqueeze(-2)).flatten(-2)
        normed = self.norm_conv(value)
        if mask is not None:
            value, normed = value * mask.unsqueeze(-1), normed * mask.unsqueeze(-1)
        added: Tensor = value + self._convolve(normed, cache)
        return x + added

    def _convolve(self, x: Tensor, cache: NGramCache | None) -> Tensor:
        steps = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]).transpose(1, 2)
        past = None if cache is None else cache.values
        if past is None:
            reach = (self.conv.kernel_size[0] - 1) * self.conv.dilation[0]
            past = steps.new_zeros(*steps.shape[:2], reach)
        joined = torch.cat([past, steps], dim=-1)
        if cache is not None:
            cache.values = joined[..., steps.size(-1) :].detach().clone()
        count = steps.size(-1)
        if count == 0:
            joined = pad(joined, (0, 1))  # A convolution needs an item.
        return silu(self.conv(joined)[..., :count]).transpose(1, 2).reshape(x.shape)


class _StreamNorm(Module):
    """Divides the hidden state of each stream by its root mean square, and scales it."""

    def __init__(self, streams: int, size: int, eps: float, **place: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(torch.ones(streams, size, **place))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, self.weight.shape).float()
        normed = rms_norm(parts, self.weight.shape[-1:], eps=self.eps) * self.weight.float()
        return normed.flatten(-2).to(x.dtype)
