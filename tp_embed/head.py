"""The output head that shares the table of a sharded embedding."""

from __future__ import annotations

from typing import final

from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from tp_embed.collectives import copy_to_gang, gather_columns, reduce_partial, scatter_columns
from tp_embed.embedding import ShardedEmbedding, VocabShardedEmbedding
from tp_embed.layer import GangLayer


@final
class TiedHead(GangLayer):
    """Projects hidden states to logits with the table of ``embed``, of which it holds the same
    Parameter: the gradient of the table is the sum of both uses.

    Over the vocabulary, each rank computes the logits of its rows; an all-gather of N ceil(V/P)
    items puts them together, and the backward does one all-reduce of N E items. Over the embedding
    dimension, each rank contributes to all logits; they take an all-reduce of N V items, and the
    backward an all-gather of N ceil(E/P). The former sends about half of what the latter does.

    As with any tied Parameter in torch, what replaces Parameters (``to_empty()``, loading with
    ``assign=True``) breaks the tie; mend it with ``head.weight = embed.weight``.

    :param embed: the embedding whose table is the head's weight.
    :param bias: a bias that is added to the logits, the same on every rank. *Shape:* :math:`(V)`.
    :raises TypeError: ``embed`` is not a sharded embedding.
    """

    def __init__(
        self, embed: ShardedEmbedding | VocabShardedEmbedding, *, bias: Parameter | None = None
    ) -> None:
        super().__init__()
        if not isinstance(embed, (ShardedEmbedding, VocabShardedEmbedding)):
            raise TypeError(
                "`embed` must be a `ShardedEmbedding` or a `VocabShardedEmbedding`, "
                f"but is a `{type(embed).__name__}` instead."
            )
        self.weight = embed.weight
        self.bias = bias
        self.gang = embed.gang
        self.partition = embed.partition
        self.shard_dim = embed.shard_dim
        self.gang.adopt(self)

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :returns: the logits. *Shape:* :math:`(*,V)`.
        """
        if self.shard_dim == 0:
            logits = linear(copy_to_gang(x, self.gang), self.weight)
            logits = gather_columns(logits, self.gang, self.partition)
        else:
            logits = linear(scatter_columns(x, self.gang, self.partition), self.weight)
            logits = reduce_partial(logits, self.gang)
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        return self._shard_repr(self.shard_dim, self.partition)
