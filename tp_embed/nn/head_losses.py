"""Losses and other values of tokens by an output head, without holding all logits."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from tp_embed.gang import Gang
from tp_embed.gang.collectives import (
    copy_to_gang,
    gather_columns,
    gather_positions,
    positions_to_columns,
    scatter_columns,
)
from tp_embed.nn.chunks import Projection
from tp_embed.nn.gang_layer import GangLayer
from tp_embed.nn.loss import linear_cross_entropy
from tp_embed.nn.sequence import blocks_of_positions, whole_target
from tp_embed.nn.tiled_values import Deterministic, TiledProjection, tiled_loss, tiled_top_k
from tp_embed.nn.token_loss import LossOptions
from tp_embed.nn.token_values import (
    ChunkedProjection,
    divergences,
    entropies,
    reduced_loss,
    token_losses,
    top_k,
)
from tp_embed.parameter.sharded import check_block, unguarded
from tp_embed.partition import Partition

# By default the head's.
SoftCap = float | EllipsisType | None


class HeadLosses(GangLayer):
    """The functions of :class:`~tp_embed.OutputHead` that hold a chunk of logits at a time."""

    gang: Gang
    partition: Partition
    shard_dim: int
    in_features: int
    out_features: int
    weight: Parameter
    bias: Parameter | None
    soft_cap: float | None
    input: str
    deterministic: Deterministic = None

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        bias: Tensor | EllipsisType | None = ...,
        weight: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        soft_cap: SoftCap = ...,
        length: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Computes the cross entropy of the logits of ``x`` without holding them all. See
        :func:`tp_embed.nn.loss.linear_cross_entropy` for the options and communication volumes; in
        addition, it sends what :meth:`forward` sends of hidden states and of their gradient.
        ``soft_cap`` defaults to the head's.

        With ``weight`` or ``reduction="none"``, costs as much as :meth:`log_probs`.

        :param x: the hidden states, as for :meth:`forward`.
        :param target: the classes, the same on every rank, also for ``input="sequence"``. *Shape:*
            :math:`(*)`. With ``length`` this rank's, *Shape:* :math:`(*,S_{rank})`.
        :param bias: instead of the head's. *Shape:* :math:`(V)`.
        :param weight: weights of the classes, as in :func:`torch.nn.functional.cross_entropy`; the
            same on every rank. Not with ``z_loss``. *Shape:* :math:`(V)`.
        :param reduction: ``"mean"`` over the tokens that are not ignored, weighted by the weights
            of their targets; ``"sum"``; or ``"none"``.
        :param length: S, for ``input="sequence"`` and a ``target`` of this rank's positions, which
            an all-gather collects.
        :returns: the loss of all positions, the same on every rank. *Shape:* :math:`()`, or
            :math:`(*)` for ``"none"``. *Dtype:* fp32, or fp64 for fp64.
        :raises ValueError: as :meth:`forward` and :func:`~tp_embed.nn.loss.linear_cross_entropy`.
        """
        if self.input == "sequence":
            target = whole_target(target, length, self.gang)
            length = target.size(-1)
        projection = self._projection(x, soft_cap=soft_cap, bias=bias, length=length)
        if isinstance(projection, TiledProjection):
            return tiled_loss(projection, target, weight, reduction, **options)
        if weight is not None or reduction not in ("mean", "sum"):
            options.pop("accum_dtype", None)  # Each row of the gradient is computed at once.
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

        As all of these functions, computes logits of a chunk of tokens at a time, 8 MiB or as many
        as ``x`` has items, and again in the backward. Sends a few fp32 numbers per token, in one
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
        teacher_head: HeadLosses,
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
        :raises TypeError: ``teacher_head`` is not an :class:`~tp_embed.OutputHead`.
        :raises ValueError: shapes or heads do not match, ``temperature`` is not positive, or
            ``teacher_x`` requires a gradient.
        """
        self._check_teacher(x, teacher_x, teacher_head)
        student, tiled = self._projection(x, temperature, soft_cap), bool(self.deterministic)
        with torch.no_grad():
            teacher = teacher_head._projection(
                teacher_x, temperature, teacher_soft_cap, tiled=tiled
            )
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
        projection = self._projection(x, soft_cap=soft_cap)
        if isinstance(projection, TiledProjection):
            return tiled_top_k(projection, k)
        values: tuple[Tensor, Tensor] = top_k(projection, k)
        return values

    def _projection(
        self,
        x: Tensor,
        temperature: float = 1.0,
        soft_cap: SoftCap = ...,
        bias: Tensor | EllipsisType | None = ...,
        length: int | None = None,
        *,
        tiled: bool | None = None,
    ) -> Projection:
        """Prepares hidden states for functions of :mod:`tp_embed.nn.token_values`.

        :param tiled: whether to compute by tiles; by default as ``deterministic`` of the head says.
        """
        self._mask_gradient()
        self._check_block()
        tiled = bool(self.deterministic) if tiled is None else tiled
        whole = self.bias if bias is ... else bias
        own = whole if self.shard_dim or tiled else self._own(whole)
        cap = self.soft_cap if soft_cap is ... else soft_cap
        place = self.gang, self.partition, self.shard_dim
        inputs = self._inputs(x, length, tiled), self.weight, own, *place, cap, temperature
        return TiledProjection(*inputs) if tiled else ChunkedProjection(*inputs)

    def _check_teacher(self, x: Tensor, teacher_x: Tensor, teacher_head: object) -> None:
        if not isinstance(teacher_head, HeadLosses):
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
                "Shard both by the same strategy over the same gang, with the same `input`."
            )

    def _cut(self) -> str:
        """Describes which classes and ranks it is cut over, and which positions it takes."""
        axis = "the embedding dimension" if self.shard_dim else "the vocabulary"
        ranks = getattr(self.gang, "global_ranks", f"{self.gang.size} ranks")
        cut = f"{self.out_features} classes along {axis} over {ranks} as rank {self.gang.rank}"
        return f"{cut}, for {self.input} hidden states"

    def _inputs(self, x: Tensor, length: int | None, tiled: bool = False) -> Tensor:
        """Returns the hidden states that the product takes: of all positions, this rank's columns
        if the table is sharded along the embedding dimension. By tiles, it takes whole ones, and
        returns a whole gradient."""
        gang, columns = self.gang, self.partition
        if self.input == "sequence":
            positions = blocks_of_positions(x, length, gang)
            if tiled:
                return gather_columns(x.mT, gang, positions).mT
            if self.shard_dim:
                return positions_to_columns(x, gang, positions, columns)
            return gather_positions(x, gang, positions)
        if length is not None:
            raise ValueError(
                "`length` must be None for hidden states of all positions, but is "
                f"{length} instead. For those of this rank's make the head with "
                "`input='sequence'`."
            )
        if tiled:
            return x
        return scatter_columns(x, gang, columns) if self.shard_dim else copy_to_gang(x, gang)

    def _check_whole(self, what: str) -> None:
        if self.input != "replicated":
            raise ValueError(
                f"`input` must be 'replicated' for {what}, but is {self.input!r} instead. Gather "
                "the hidden states before the head."
            )

    def _check_block(self) -> None:
        self._check_mapped(self.weight)
        with unguarded():
            check_block(self.weight, self.gang, self.partition, self.shard_dim)

    def _own(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        own = self.partition.shard(self.gang.rank)
        return copy_to_gang(bias, self.gang)[own.start : own.stop]
