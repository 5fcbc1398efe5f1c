"""The output head over a sharded table, usually tied to the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from tp_embed._torch_private import linear
from tp_embed.gang.collectives import gather_columns, reduce_partial
from tp_embed.nn.deferred import DeferredLogits
from tp_embed.nn.embedding import RowWiseEmbedding, ShardedEmbedding, VocabShardedEmbedding
from tp_embed.nn.head_losses import HeadLosses
from tp_embed.nn.local_logits import as_local_logits
from tp_embed.nn.projection import product_dtypes
from tp_embed.nn.tiled_values import Deterministic, TiledProjection, tiled_logits
from tp_embed.nn.token_loss import check_soft_cap
from tp_embed.parameter.sharded import unguarded

Input = Literal["replicated", "sequence"]


@final
class OutputHead(HeadLosses):
    """Projects hidden states to logits with the table of ``embed``. Shares the Parameter with
    ``embed``, so the gradient of the table is the sum of both uses.

    Sharded along the vocabulary, each rank computes the logits of its rows; the forward does one
    all-gather of N ceil(V/P) items and the backward one all-reduce of N E items. With
    ``output="shard"`` each rank keeps its own logits and the forward sends nothing. Sharded along
    the embedding dimension, each rank contributes to all logits; the forward does one all-reduce of
    N V items and the backward one all-gather of N ceil(E/P). Prefer :meth:`loss` for a loss: it
    never holds all logits.

    With ``input="sequence"``, for sequence parallelism, ``x`` holds this rank's block of positions,
    its second to last dimension, as ``output="sequence"`` of an embedding returns it. Logits and
    losses cover all positions, on every rank, as from ``sequence_parallel_enabled`` of
    Megatron's ``ColumnParallelLinear``. For a block of n items (shorter ones are sent padded), each
    rank sends (P-1) n in the forward and as much in the backward, instead of the collective over
    hidden states: sharded along the vocabulary, an all-gather and a reduce-scatter; along the
    embedding dimension, two all-to-alls of (P-1) n/P.

    With ``deterministic="topology"``, values and gradients have the same bits at every size of the
    gang and for both ways of sharding, on the same type of machine with the same dtypes, options
    and number of threads. The vocabulary is cut into tiles at fixed places (512 classes; 4096 on
    accelerators). One rank computes each, and sums over tiles are exact. Instead of what is sent by
    default, functions then send 3 to 5 fp32 numbers per token and tile, in one all-gather per chunk
    of tokens (:meth:`top_k` and :meth:`forward`: what they do by default); for the gradient of the
    hidden states one all-reduce of N E fp64 numbers; for the gradient of the bias one of V numbers;
    and for the weight, and again for its gradient, one all-to-all: of less than a tile per rank for
    a table that is sharded along the vocabulary, else of V E/P items per rank. Second derivatives,
    transforms of :mod:`torch.func` and graphs are refused.

    As with any tied Parameter in torch, operations that replace Parameters (``to_empty()``, loading
    with ``assign=True``) break the tie; restore it with ``head.weight = embed.weight``.

    :param embed: the embedding whose table is the head's weight.
    :param bias: added to the logits; the same on every rank. *Shape:* :math:`(V)`.
    :param soft_cap: :math:`c`, which turns each logit :math:`l` into :math:`c \\tanh(l/c)` (Gemma
        2; Gemma Team, 2024). Leave it out for the head of a transformers model, which caps the
        logits itself, and pass it to :meth:`loss`.
    :param input: what each rank passes: ``"replicated"``: all hidden states, the same on every
        rank; ``"sequence"``: the hidden states of its positions, :math:`(*,S_{rank},E)`.
    :param output: ``"replicated"``: each rank gets :math:`(*,V)`; ``"shard"``, for a table that is
        sharded along the vocabulary: each rank gets its own classes, :math:`(*,V_{rank})`, as
        :func:`tp_embed.nn.loss.cross_entropy` takes them, as
        :class:`~tp_embed.nn.local_logits.LocalLogits` over several ranks; ``"deferred"``: each
        rank gets :class:`~tp_embed.nn.deferred.DeferredLogits`, which
        ``torch.nn.functional.cross_entropy`` takes, in a model that calls its head and its loss
        itself.
    :param deterministic: ``None``, or ``"topology"`` for the same bits at every size of the gang.
    :raises TypeError: ``embed`` is not a sharded embedding.
    :raises ValueError: ``input`` or ``deterministic`` is invalid, ``output`` is invalid or not
        supported for ``embed`` or ``deterministic``, ``bias`` has another shape, or ``soft_cap`` is
        not positive.
    """

    def __init__(
        self,
        embed: ShardedEmbedding | VocabShardedEmbedding,
        *,
        bias: Parameter | None = None,
        soft_cap: float | None = None,
        input: Input = "replicated",
        output: Literal["replicated", "shard", "deferred"] = "replicated",
        deterministic: Deterministic = None,
    ) -> None:
        super().__init__()
        if not isinstance(embed, (ShardedEmbedding, VocabShardedEmbedding)):
            raise TypeError(
                "`embed` must be a `ShardedEmbedding` or a `VocabShardedEmbedding`, "
                f"but is a `{type(embed).__name__}` instead."
            )
        outputs = ("replicated", *([] if embed.shard_dim else ["shard"]), "deferred")
        if output not in outputs:
            raise ValueError(
                f"`output` must be one of {outputs} for the table of a `{type(embed).__name__}`, "
                f"but is {output!r} instead."
            )
        if input not in get_args(Input):
            raise ValueError(f"`input` must be one of {get_args(Input)}, but is {input!r} instead.")
        _check_deterministic(deterministic, output)
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
        self.input = input
        self.output = output
        self.deterministic = deterministic
        self._adopt()

    @property
    def rows(self) -> range:
        """The classes whose rows of the table ``weight`` holds."""
        if self.shard_dim:
            return range(self.out_features)
        return self.partition.shard(self.gang.rank)

    def forward(
        self,
        x: Tensor,
        length: int | None = None,
        *,
        compute: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | DeferredLogits:
        """
        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`; for
            ``input="sequence"`` those of this rank's positions, *Shape:* :math:`(*,S_{rank},E)`.
        :param length: S, for ``input="sequence"``; if ``None``, ranks exchange how many positions
            each holds, in an all-gather of P numbers, which waits for the device.
        :param compute: returns what to return for ``x`` instead of logits, such as a loss by
            :meth:`loss`. Engines gather the weight around a call of the layer: ZeRO 3 holds it as
            long as ``compute`` runs.
        :returns: the logits. *Shape:* :math:`(*,V)`, or :math:`(*,V_{rank})` for ``"shard"``.
        :raises ValueError: ``x`` does not hold this rank's block of positions, or ``length`` is
            given for ``input="replicated"``.
        """
        self._check_input(x)
        if compute is not None:
            return compute(x)
        if self.output == "deferred":
            self._check_whole("output='deferred'")
            return DeferredLogits(self, x, product_dtypes(x, self.weight)[0])
        _check_deterministic(self.deterministic, self.output)
        if self.deterministic:
            projection = self._projection(x, soft_cap=None, length=length)
            assert isinstance(projection, TiledProjection)
            return self._capped(tiled_logits(projection))
        self._mask_gradient()
        self._check_block()
        x = self._inputs(x, length)
        if self.gang.size == 1:
            return self._capped(self._product(x, self.bias))
        if self.output == "shard":
            logits = self._capped(self._product(x, self._own(self.bias)))
            return as_local_logits(logits)
        logits = self._product(x)
        if self.shard_dim == 0:
            logits = gather_columns(logits, self.gang, self.partition)
        else:
            logits = reduce_partial(logits, self.gang)
        # Keep the dtype of the product, which autocast chooses.
        return self._capped(logits if self.bias is None else logits + self.bias.to(logits.dtype))

    def _product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        with unguarded():
            # torch's own: DeepSpeed's, at ZeRO 3, reads the weight in its backward.
            return linear(x, self.weight, bias)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def extra_repr(self) -> str:
        parts = [self._shard_repr(self.shard_dim, self.partition)]
        if self.soft_cap is not None:
            parts.append(f"soft_cap={self.soft_cap}")
        if self.input != "replicated":
            parts.append(f"input={self.input!r}")
        if self.output != "replicated":
            parts.append(f"output={self.output!r}")
        if self.deterministic is not None:
            parts.append(f"deterministic={self.deterministic!r}")
        return ", ".join(parts)


def _check_deterministic(deterministic: object, output: str) -> None:
    if deterministic not in (None, "topology"):
        raise ValueError(
            f"`deterministic` must be None or 'topology', but is {deterministic!r} instead."
        )
    if deterministic and output == "shard":
        raise ValueError(
            "`output` must not be 'shard' with `deterministic='topology'`, since a loss of each "
            "rank's logits depends on the gang. Use `head.loss()`, or `output='deferred'`."
        )


# All layers that hold a shard of a table.
ShardedLayer = ShardedEmbedding | VocabShardedEmbedding | RowWiseEmbedding | OutputHead
