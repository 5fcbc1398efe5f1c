"""The output head over a sharded table, usually tied to the embedding."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import Parameter

from tp_embed._torch_private import linear
from tp_embed.gang.collectives import copy_to_gang, gather_columns, reduce_partial, scatter_columns
from tp_embed.nn.deferred import DeferredLogits
from tp_embed.nn.embedding import ShardedEmbedding, VocabShardedEmbedding
from tp_embed.nn.gang_layer import GangLayer
from tp_embed.nn.loss import linear_cross_entropy
from tp_embed.nn.projection import product_dtypes
from tp_embed.nn.token_loss import LossOptions, check_soft_cap
from tp_embed.nn.token_values import (
    Projection,
    divergences,
    entropies,
    reduced_loss,
    token_losses,
    top_k,
)
from tp_embed.parameter.sharded import check_block, unguarded

# By default the head's.
SoftCap = float | EllipsisType | None


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
        :func:`tp_embed.nn.loss.cross_entropy` takes them; ``"deferred"``: each rank gets
        :class:`~tp_embed.nn.deferred.DeferredLogits`, which ``torch.nn.functional.cross_entropy``
        takes, in a model that calls its head and its loss itself.
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
        output: Literal["replicated", "shard", "deferred"] = "replicated",
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

    def forward(self, x: Tensor) -> Tensor | DeferredLogits:
        """
        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :returns: the logits. *Shape:* :math:`(*,V)`, or :math:`(*,V_{rank})` for ``"shard"``.
        """
        self._check_input(x)
        if self.output == "deferred":
            return DeferredLogits(self, x, product_dtypes(x, self.weight)[0])
        self._mask_gradient()
        self._check_block()
        if self.gang.size == 1:
            return self._capped(self._product(x, self.bias))
        if self.output == "shard":
            return self._capped(self._product(copy_to_gang(x, self.gang), self._own(self.bias)))
        if self.shard_dim == 0:
            logits = self._product(copy_to_gang(x, self.gang))
            logits = gather_columns(logits, self.gang, self.partition)
        else:
            logits = self._product(scatter_columns(x, self.gang, self.partition))
            logits = reduce_partial(logits, self.gang)
        # Keep the dtype of the product, which autocast chooses.
        return self._capped(logits if self.bias is None else logits + self.bias.to(logits.dtype))

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        bias: Tensor | EllipsisType | None = ...,
        weight: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        soft_cap: SoftCap = ...,
        **options: Any,
    ) -> Tensor:
        """Computes the cross entropy of the logits of ``x`` without holding them all. See
        :func:`tp_embed.nn.loss.linear_cross_entropy` for the options and communication volumes; in
        addition, the backward sends as much as the backward of :meth:`forward`. ``soft_cap``
        defaults to the head's.

        With ``weight`` or ``reduction="none"``, costs as much as :meth:`log_probs`.

        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :param target: the classes, the same on every rank. *Shape:* :math:`(*)`.
        :param bias: instead of the head's. *Shape:* :math:`(V)`.
        :param weight: weights of the classes, as in :func:`torch.nn.functional.cross_entropy`; the
            same on every rank. Not with ``z_loss``. *Shape:* :math:`(V)`.
        :param reduction: ``"mean"`` over the tokens that are not ignored, weighted by the weights
            of their targets; ``"sum"``; or ``"none"``.
        :returns: the same on every rank. *Shape:* :math:`()`, or :math:`(*)` for ``"none"``.
            *Dtype:* fp32, or fp64 for fp64.
        """
        projection = self._projection(x, soft_cap=soft_cap, bias=bias)
        if weight is not None or reduction not in ("mean", "sum"):
            return reduced_loss(projection, target, weight, reduction, LossOptions(**options))
        loss: Tensor = linear_cross_entropy(
            projection.x,
            self.weight,
            target,
            self.gang,
            self.partition,
            shard_dim=self.shard_dim,
            bias=projection.bias,
            reduction=reduction,
            soft_cap=projection.soft_cap,
            **options,
        )
        return loss

    def log_probs(
        self,
        x: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        *,
        ignore_index: int = -100,
        soft_cap: SoftCap = ...,
    ) -> Tensor:
        """Computes the log-probability of each target, from the logits divided by ``temperature``,
        without holding all logits.

        As all of these functions, computes logits of a chunk of tokens at a time, in as much memory
        as :meth:`loss`, and again in the backward. Sends a few fp32 numbers per token, in one
        all-gather; here 2 + K, (P-1) (2 + K) 4 N bytes. The backward sends as much as the backward
        of :meth:`forward`. Sharded along the embedding dimension, both also all-reduce all N V
        logits, chunk by chunk. Second derivatives, transforms of :mod:`torch.func` and graphs hold
        all logits of this rank.

        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :param target: the classes, the same on every rank. *Shape:* :math:`(*)`, or :math:`(*,K)`
            for K classes of each token, such as a teacher's :meth:`top_k`.
        :param ignore_index: the target of tokens whose log-probability is 0, with no gradient.
        :param soft_cap: defaults to the head's.
        :returns: the same on every rank. *Shape:* that of ``target``. *Dtype:* fp32, or fp64 for
            fp64.
        :raises ValueError: shapes do not match, or ``temperature`` is not positive.
        :raises IndexError: a target is neither a class nor ``ignore_index``. On an accelerator, a
            device-side assertion fails instead, as in torch.
        """
        projection = self._projection(x, temperature, soft_cap)
        return -token_losses(projection, target, None, LossOptions(ignore_index))

    def entropy(
        self,
        x: Tensor,
        temperature: float = 1.0,
        *,
        soft_cap: SoftCap = ...,
    ) -> Tensor:
        """Computes the entropy of each token's distribution, in nats, from the logits divided by
        ``temperature``. Classes with a logit of -inf add nothing. See :meth:`log_probs` for memory
        and communication; gathers 3 numbers per token.

        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :param soft_cap: defaults to the head's.
        :returns: the same on every rank. *Shape:* :math:`(*)`. *Dtype:* as :meth:`log_probs`.
        :raises ValueError: ``temperature`` is not positive.
        """
        return entropies(self._projection(x, temperature, soft_cap))

    def kl_divergence(
        self,
        x: Tensor,
        teacher_x: Tensor,
        teacher_head: OutputHead,
        temperature: float = 1.0,
        *,
        reverse: bool = False,
        soft_cap: SoftCap = ...,
        teacher_soft_cap: SoftCap = ...,
    ) -> Tensor:
        """Computes the Kullback-Leibler divergence between each token's distribution and a
        teacher's, both from logits divided by ``temperature``: KL(teacher || student), as
        :func:`torch.nn.functional.kl_div`, or KL(student || teacher) if ``reverse``. Infinite if
        the other distribution lacks a class of the first. The result is not multiplied by the
        square of the temperature.

        See :meth:`log_probs` for memory and communication; gathers 5 numbers per token. The teacher
        gets no gradient.

        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :param teacher_x: those of the teacher, whose size may differ. *Shape:* :math:`(*,E')`.
        :param teacher_head: the teacher's head: of the same classes, sharded along the same
            dimension over the same ranks. May be this head.
        :param soft_cap: defaults to the head's; ``teacher_soft_cap`` to the teacher's head's.
        :returns: the same on every rank. *Shape:* :math:`(*)`. *Dtype:* as :meth:`log_probs`.
        :raises TypeError: ``teacher_head`` is not an :class:`OutputHead`.
        :raises ValueError: shapes or heads do not match, ``temperature`` is not positive, or
            ``teacher_x`` requires a gradient.
        """
        self._check_teacher(x, teacher_x, teacher_head)
        student = self._projection(x, temperature, soft_cap)
        with torch.no_grad():
            teacher = teacher_head._projection(teacher_x, temperature, teacher_soft_cap)
        return divergences(student, teacher, reverse=reverse)

    def top_k(self, x: Tensor, k: int, *, soft_cap: SoftCap = ...) -> tuple[Tensor, Tensor]:
        """Finds the k largest logits of each token, without holding all logits. Equal logits come
        in the order of their ids; :func:`torch.topk` takes any of them. NaN counts as the largest,
        as in torch.

        See :meth:`log_probs` for memory; gathers k logits and k int64 ids per token and rank, in
        two all-gathers. The backward is the one of whole logits.

        :param x: the hidden states, the same on every rank. *Shape:* :math:`(*,E)`.
        :param soft_cap: defaults to the head's.
        :returns: logits, largest first, and ids, the same on every rank. *Shape:* :math:`(*,k)`.
            *Dtype:* as :meth:`log_probs`, and int64.
        :raises ValueError: ``k`` is not in [1, V].
        """
        values: tuple[Tensor, Tensor] = top_k(self._projection(x, soft_cap=soft_cap), k)
        return values

    def _projection(
        self,
        x: Tensor,
        temperature: float = 1.0,
        soft_cap: SoftCap = ...,
        bias: Tensor | EllipsisType | None = ...,
    ) -> Projection:
        """Prepares hidden states that are the same on every rank for functions of
        :mod:`tp_embed.nn.token_values`."""
        self._mask_gradient()
        self._check_block()
        whole = self.bias if bias is ... else bias
        if self.shard_dim == 0:
            x, whole = copy_to_gang(x, self.gang), self._own(whole)
        else:
            x = scatter_columns(x, self.gang, self.partition)
        cap = self.soft_cap if soft_cap is ... else soft_cap
        place = self.gang, self.partition, self.shard_dim
        return Projection(x, self.weight, whole, *place, cap, temperature)

    def _check_teacher(self, x: Tensor, teacher_x: Tensor, teacher_head: object) -> None:
        if not isinstance(teacher_head, OutputHead):
            raise TypeError(
                f"`teacher_head` must be an `OutputHead`, but is a `{type(teacher_head).__name__}` "
                "instead. Shard the teacher by `shard_embeddings()`, over the same gang."
            )
        if x.shape[:-1] != teacher_x.shape[:-1]:
            raise ValueError(
                f"`teacher_x` must have the shape {(*x.shape[:-1], teacher_head.in_features)}, but "
                f"has {tuple(teacher_x.shape)} instead."
            )
        if teacher_x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "`teacher_x` must not require a gradient, since the teacher gets none. Compute it "
                "under `torch.no_grad()`, or pass `teacher_x.detach()`."
            )
        ours, theirs = self._cut(), teacher_head._cut()
        if ours != theirs:
            raise ValueError(
                f"`teacher_head` must be cut like this head, {ours}, but is {theirs} instead. "
                "Shard both by the same strategy over the same gang."
            )

    def _cut(self) -> str:
        """Describes which classes and ranks it is cut over."""
        axis = "the embedding dimension" if self.shard_dim else "the vocabulary"
        ranks = getattr(self.gang, "global_ranks", f"{self.gang.size} ranks")
        return f"{self.out_features} classes along {axis} over {ranks} as rank {self.gang.rank}"

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

    def _own(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        own = self.partition.shard(self.gang.rank)
        return copy_to_gang(bias, self.gang)[own.start : own.stop]

    def extra_repr(self) -> str:
        parts = [self._shard_repr(self.shard_dim, self.partition)]
        if self.soft_cap is not None:
            parts.append(f"soft_cap={self.soft_cap}")
        if self.output != "replicated":
            parts.append(f"output={self.output!r}")
        return ", ".join(parts)


# All layers that hold a shard of a table.
ShardedLayer = ShardedEmbedding | VocabShardedEmbedding | OutputHead
