"""The output head over a sharded table, usually tied to the embedding."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import Parameter

from tp_embed._torch_private import linear
from tp_embed.gang.collectives import copy_to_gang, gather_columns, reduce_partial, scatter_columns
from tp_embed.nn.embedding import ShardedEmbedding, VocabShardedEmbedding
from tp_embed.nn.gang_layer import GangLayer
from tp_embed.nn.loss import linear_cross_entropy
from tp_embed.nn.token_loss import check_soft_cap
from tp_embed.parameter.sharded import check_block, unguarded


@final
class OutputHead(GangLayer):
    """Projects hidden states to logits with the table of ``embed``. Shares the Parameter with
    ``embed``, so the gradient of the table is the sum of both uses.

    Sharded along the vocabulary, each rank computes the logits of its rows; the forward does one
    all-gather of N ceil(V/P) items and the backward one all-reduce of N E items. With
    ``output="shard"`` each rank keeps its own logits and the forward sends nothing. Sharded along
    the embedding dimension, each rank contributes to all logits; the forward does one all-reduce of
    N V items and the backward one all-gather of N ceil(E/P). Prefer :meth:`loss` for a loss: it
    never holds all logits.

    As with any tied Parameter in torch, operations that replace Parameters (``to_empty()``, loading
    with ``assign=True``) break the tie; restore it with ``head.weight = embed.weight``.

    :param embed: the embedding whose table is the head's weight.
    :param bias: added to the logits; the same on every rank. *Shape:* :math:`(V)`.
    :param soft_cap: :math:`c`, which turns each logit :math:`l` into :math:`c \\tanh(l/c)` (Gemma
        2; Gemma Team, 2024). Leave it out for the head of a transformers model, which caps the
        logits itself, and pass it to :meth:`loss`.
    :param output: ``"replicated"``: each rank gets :math:`(*,V)`; ``"shard"``, for a table that is
        sharded along the vocabulary: each rank gets its own classes, :math:`(*,V_{rank})`, as
        :func:`tp_embed.nn.loss.cross_entropy` takes them.
    :raises TypeError: ``embed`` is not a sharded embedding.
    :raises ValueError: ``output`` is invalid or not supported for ``embed``, ``bias`` has another
        shape, or ``soft_cap`` is not positive.
    """

    def __init__(
        self,
        embed: ShardedEmbedding | VocabShardedEmbedding,
        *,
        bias: Parameter | None = None,
        soft_cap: float | None = None,
        output: Literal["replicated", "shard"] = "replicated",
    ) -> None:
        super().__init__()
        if not isinstance(embed, (ShardedEmbedding, VocabShardedEmbedding)):
            raise TypeError(
                "`embed` must be a `ShardedEmbedding` or a `VocabShardedEmbedding`, "
                f"but is a `{type(embed).__name__}` instead."
            )
        outputs = ("replicated",) if embed.shard_dim else ("replicated", "shard")
        if output not in outputs:
            raise ValueError(
                f"`output` must be one of {outputs} for the table of a `{type(embed).__name__}`, "
                f"but is {output!r} instead."
            )
        num_classes = embed.num_embeddings
        if bias is not None and bias.shape != (num_classes,):
            raise ValueError(
                f"`bias` must have the shape {(num_classes,)} (num_embeddings), whole on each "
                f"rank, but has {tuple(bias.shape)} instead."
            )
        check_soft_cap(soft_cap)
        self.gang = embed.gang
        self.partition = embed.partition
        self.shard_dim = embed.shard_dim
        self.in_features = embed.embed_dim
        self.out_features = num_classes
        self.train_rows = embed.train_rows
        self.weight = embed.weight
        self.bias = bias
        self.soft_cap = soft_cap
        self.output = output
        self._adopt()

    @property
    def rows(self) -> range:
        """The classes whose rows of the table ``weight`` holds."""
        if self.shard_dim:
            return range(self.out_features)
        return self.partition.shard(self.gang.rank)

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :returns: the logits. *Shape:* :math:`(*,V)`, or :math:`(*,V_{rank})` for ``"shard"``.
        """
        self._check_input(x)
        self._mask_gradient()
        self._check_block()
        if self.gang.size == 1:
            return self._capped(self._product(x, self.bias))
        if self.output == "shard":
            return self._capped(self._product(copy_to_gang(x, self.gang), self._own_bias()))
        if self.shard_dim == 0:
            logits = self._product(copy_to_gang(x, self.gang))
            logits = gather_columns(logits, self.gang, self.partition)
        else:
            logits = self._product(scatter_columns(x, self.gang, self.partition))
            logits = reduce_partial(logits, self.gang)
        # Keep the dtype of the product, which autocast chooses.
        return self._capped(logits if self.bias is None else logits + self.bias.to(logits.dtype))

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Computes the cross entropy of the logits of ``x`` without holding them all. See
        :func:`tp_embed.nn.loss.linear_cross_entropy` for the options and communication volumes; in
        addition, the backward sends as much as the backward of :meth:`forward`. ``soft_cap``
        defaults to the head's.

        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :param target: the classes, the same on every rank. *Shape:* :math:`(*)`.
        """
        self._mask_gradient()
        self._check_block()
        if self.shard_dim == 0:
            x, bias = copy_to_gang(x, self.gang), self._own_bias()
        else:
            x, bias = scatter_columns(x, self.gang, self.partition), self.bias
        loss: Tensor = linear_cross_entropy(
            x,
            self.weight,
            target,
            self.gang,
            self.partition,
            shard_dim=self.shard_dim,
            bias=bias,
            **{"soft_cap": self.soft_cap, **options},
        )
        return loss

    def _check_block(self) -> None:
        with unguarded():
            check_block(self.weight, self.gang, self.partition, self.shard_dim)

    def _product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        with unguarded():
            # torch's own: DeepSpeed's, at ZeRO 3, reads the weight in its backward.
            return linear(x, self.weight, bias)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _own_bias(self) -> Tensor | None:
        if self.bias is None:
            return None
        own = self.partition.shard(self.gang.rank)
        return copy_to_gang(self.bias, self.gang)[own.start : own.stop]

    def extra_repr(self) -> str:
        parts = [self._shard_repr(self.shard_dim, self.partition)]
        if self.soft_cap is not None:
            parts.append(f"soft_cap={self.soft_cap}")
        if self.output != "replicated":
            parts.append(f"output={self.output!r}")
        return ", ".join(parts)


# All layers that hold a shard of a table.
ShardedLayer = ShardedEmbedding | VocabShardedEmbedding | OutputHead
