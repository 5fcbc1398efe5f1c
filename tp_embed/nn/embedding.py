"""Embedding modules: one table, whole or sharded over a gang.

:mod:`tp_embed.lookup.exchange` lists the communication volumes.
"""

from __future__ import annotations

from typing import Any, Literal, Self, final, get_args

import torch
from torch import Tensor

from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.collectives import gather_table
from tp_embed.lookup.exchange import Dedup
from tp_embed.lookup.options import GradReduction, Output
from tp_embed.lookup.train_rows import Rows
from tp_embed.nn.table import Embedding, InitFn, Table
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition, as_slice

__all__ = [
    "Embedding",
    "InitFn",
    "RowWiseEmbedding",
    "ShardedEmbedding",
    "StandardEmbedding",
    "VocabShardedEmbedding",
]


@final
class StandardEmbedding(Table):
    """Stores embeddings of a fixed dictionary and size in an in-memory table.

    :param num_embeddings: V, the size of the embedding table.
    :param embed_dim: E, the size of each embedding.
    :param pad_idx: if not ``None``, the row that is initialized to zero and gets no gradient, so
        training doesn't update it; negative values count from the end.
    :param init_fn: called with this embedding to initialize the table. If ``None``, the table is
        drawn from the standard normal distribution.
    :param device: the device of the table.
    :param dtype: the dtype of the table.
    :param sparse: whether ``weight.grad`` is a coalesced sparse tensor of the rows that were used.
    :param reuse_grad: whether each dense gradient reuses the memory of the previous one and clears
        only the rows it used, so that the cost of the backward no longer grows with V. Keeps the
        memory between steps. A gradient that is still referenced is left alone; one that was
        modified in place is cleared entirely. torch doesn't count writes through ``.data``, as by
        DeepSpeed at ZeRO 0 over several data-parallel ranks, or by a collective such as
        ``dist.all_reduce(weight.grad)``: after one, call
        ``torch.autograd.graph.increment_version(weight.grad)``. Has no effect on an accelerator,
        where another stream may still read the last gradient.
    :param scale: multiplies the output, if not ``None``. A tensor, *Shape:* :math:`()`, is first
        rounded to the dtype of the output, as in scaled embeddings of transformers.
    :param train_rows: the rows that get a gradient; see :mod:`tp_embed.lookup.train_rows`.
    :raises ValueError: a size is less than 1, or ``pad_idx`` is not a row of the table.
    """

    shard_dim = 0
    outputs = ("replicated",)

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        pad_idx: int | None = None,
        *,
        init_fn: InitFn | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sparse: bool = False,
        reuse_grad: bool = False,
        scale: float | Tensor | None = None,
        train_rows: Rows | None = None,
    ) -> None:
        super().__init__(
            FakeGang("cpu"),  # Size 1: sends nothing.
            num_embeddings,
            embed_dim,
            pad_idx,
            init_fn=init_fn,
            device=device,
            dtype=dtype,
            sparse=sparse,
            reuse_grad=reuse_grad,
            scale=scale,
            train_rows=train_rows,
        )

    def _empty_whole(self, device: torch.device | str | None = None) -> StandardEmbedding:
        return self


class _ShardedTable(Table):
    """Holds a table over a gang of any size, and converts from and to a whole one."""

    @classmethod
    def from_embedding(
        cls,
        embed: StandardEmbedding,
        gang: Gang,
        *,
        output: Output = "replicated",
        dedup: Dedup = "auto",
        check_ids: int | None = None,
    ) -> Self:
        """Shards ``embed`` over ``gang``. Sends nothing: each rank copies its block out of its own
        whole table, on the same device.

        :param embed: the embedding to shard, the same on every rank.
        :param gang: the gang to shard it over.
        :param output: as in the constructor; ``dedup`` and ``check_ids`` likewise.
        """
        return cls._cut(embed, gang, output=output, dedup=dedup, check_ids=check_ids)

    @classmethod
    def _cut(cls, embed: StandardEmbedding, gang: Gang, **options: Any) -> Self:
        """:meth:`from_embedding`, with the ``options`` that a whole table doesn't have."""
        if not isinstance(embed, StandardEmbedding):
            raise TypeError(
                f"`embed` must be a `StandardEmbedding`, but is a `{type(embed).__name__}` "
                "instead. `shard_embeddings()` replaces the tables of other classes."
            )
        weight = embed.weight
        sharded = cls(
            gang,
            embed.num_embeddings,
            embed.embed_dim,
            embed.pad_idx,
            init_fn=embed.init_fn,
            device="meta",
            dtype=weight.dtype,
            **embed.options.of_whole(),
            **options,
        )
        sharded.requires_grad_(weight.requires_grad).train(embed.training)
        if weight.is_meta:
            return sharded
        sharded.to_empty(device=weight.device)
        with torch.no_grad():
            sharded.weight.copy_(weight[as_slice(sharded.rows), as_slice(sharded.columns)])
        return sharded

    def to_embedding(self, device: torch.device | str | None = None) -> StandardEmbedding:
        """Converts this instance to a :class:`StandardEmbedding`.

        Collective: all ranks of the gang must call it, and each gets the whole table. Sends (P-1)
        times the largest block, in chunks.

        :param device: the device of the whole table; defaults to the device of ``weight``.
        """
        if self.weight.is_meta:
            if device is not None and torch.device(device).type != "meta":
                raise ValueError(
                    f"`device` must be 'meta' for a table on meta, but is '{device}' instead. "
                    "Initialize the table first: `to_empty(device=...)`, `reset_parameters()`."
                )
            return self._empty_whole()
        whole = self._empty_whole(device)
        with torch.no_grad():
            gather_table(
                whole.weight, local(self.weight), self.shard_dim, self.gang, self.partition
            )
        return whole

    def _empty_whole(self, device: torch.device | str | None = None) -> StandardEmbedding:
        whole = StandardEmbedding(
            self.num_embeddings,
            self.embed_dim,
            self.pad_idx,
            init_fn=self.init_fn,
            device="meta",
            dtype=self.weight.dtype,
            **self.options.of_whole(),
        )
        whole.requires_grad_(self.weight.requires_grad).train(self.training)
        return whole.to_empty(device=device or self.weight.device)


@final
class ShardedEmbedding(_ShardedTable):
    """A :class:`StandardEmbedding` that is sharded along its embedding dimension.

    Every rank passes the same ids. A rank sends, in items, for N ids with U distinct ones:

    - ``output="replicated"``: one all-gather in the forward, (P-1) U ceil(E/P).
    - ``output="sequence"``: one all-to-all in the forward, about (P-1)/P U E/P, and one in the
      backward, (P-1)/P N E/P.
    - ``output="shard"``: nothing.

    Without de-duplication, replace U by N. See :mod:`tp_embed.lookup.exchange`.

    ``num_embeddings``, ``pad_idx``, ``dtype``, ``sparse``, ``reuse_grad``, ``scale`` and
    ``train_rows`` are documented in :class:`StandardEmbedding`.

    :param gang: the gang to shard the table over.
    :param embed_dim: E, the size of each embedding; any size for any gang.
    :param init_fn: initializes the table; see :meth:`reset_parameters`.
    :param device: the device of the table; if ``None``, torch's default device, or the device of
        the gang if the default is the CPU.
    :param output: ``"replicated"``: each rank gets :math:`(*,E)`; ``"sequence"``: each rank gets
        its contiguous block of positions along the last dimension S of the indices,
        ``Partition(S, P).shard(rank)``: :math:`(*,S_{rank},E)`; ``"shard"``: each rank
        gets its own columns, :math:`(*,E_{rank})`, and sends nothing except to compare ids: for
        lookups by one rank alone, or from several threads at once, pass ``check_ids=False``.
    :param dedup: whether to send a row only once if several positions use it: ``True``, ``False``,
        or ``"auto"``. ``"auto"`` doesn't on an accelerator, where counting distinct ids would
        synchronize with the device, and elsewhere does if at most 0.85 of the ids are distinct.
    :param check_ids: at which lookups ranks compare their ids: the first and each n-th after it,
        ``False`` for none; if ``None``, n = 128. See :class:`~tp_embed.lookup.same_ids.SameIds`
        for the communication volume, and :func:`~tp_embed.lookup.same_ids.check_interval`.
    :raises ValueError: a size is less than 1, ``pad_idx`` is not a row of the table, or an option
        has an invalid value.
    """

    shard_dim = 1
    outputs = ("replicated", "sequence", "shard")


@final
class VocabShardedEmbedding(_ShardedTable):
    """A :class:`StandardEmbedding` that is sharded along its vocabulary.

    Prefer it if an output head shares the table. Every rank passes the same ids. A rank sends, in
    items, for N ids with U distinct ones:

    - ``output="replicated"``: each distinct row once from its owner to all others in the forward,
      about (P-1)/P U E; without de-duplication one all-reduce, 2 (P-1)/P N E.
    - ``output="sequence"``: each distinct row of a rank's positions from its owner in the forward,
      about (P-1)/P U E/P; without de-duplication one reduce-scatter, (P-1)/P N E. One all-to-all
      in the backward, (P-1)/P N E/P.

    See :mod:`tp_embed.lookup.exchange` for details, and :class:`ShardedEmbedding` for parameters
    that are not listed here.

    :param num_embeddings: V, the size of the embedding table; any size for any gang.
    :param embed_dim: E, the size of each embedding.
    :param output: ``"replicated"`` or ``"sequence"``.
    :param dedup: whether to send a row only once if several positions use it: ``True``, ``False``,
        or ``"auto"``, which does on the CPU only.
    :raises ValueError: as :class:`ShardedEmbedding`.
    """

    shard_dim = 0
    outputs = ("replicated", "sequence")


Placement = Literal["block", "cyclic"]


@final
class RowWiseEmbedding(_ShardedTable):
    """A :class:`StandardEmbedding` that is sharded along its vocabulary, over ranks that each look
    up ids of their own: data-parallel ranks, or all processes of a run.

    For tables that are too large for a tensor-parallel gang. It equals one table in one process
    that looks up the ids of all ranks: the gradient is the sum over all ranks, or their mean.

    A rank that looks up N ids with U distinct ones sends, for each other rank, in the forward 32
    bytes, 4 bytes for each distinct id that this rank wants from it, and E items for each row that
    it wants; in the backward, E items for each distinct id that this rank wants from it. With ids
    that spread evenly over P ranks with U distinct ones each, that is (P-1)/P U E each way.
    On an accelerator, each lookup waits for the counts. See :mod:`tp_embed.lookup.own_ids`.

    All ranks must do the same lookups in the same order, a rank without ids with an empty tensor,
    and all must run the backward: add ``0 * output.sum()`` to the loss of a rank that does not use
    the output. The gradient is complete after the backward; nothing else may average it, so
    ``DistributedDataParallel`` is refused.

    ``num_embeddings``, ``pad_idx``, ``dtype``, ``sparse``, ``reuse_grad``, ``scale`` and
    ``train_rows`` are documented in :class:`StandardEmbedding`, ``init_fn`` and ``device`` in
    :class:`ShardedEmbedding`. The output head of a table needs another class.

    :param gang: the gang to shard the table over, of any processes.
    :param embed_dim: E, the size of each embedding.
    :param placement: which rows a rank holds: ``"block"``: a contiguous block; ``"cyclic"``: every
        P-th row, which spreads frequent rows if these are neighbours, as in most vocabularies.
        Values, initial ones too, and whole tables do not depend on it.
    :param grad_reduction: ``"sum"``: the gradient of the sum of the ranks' losses; ``"mean"``: of
        their mean, as ``DistributedDataParallel`` and DeepSpeed average gradients. If several
        tensor-parallel ranks have the same ids and output gradients, the mean counts each batch
        once.
    :param dedup: whether to send a row only once if several positions of a rank use it, and to sum
        gradients per id before they are sent: ``True``, which ``"auto"`` means too, or ``False``.
        Without it, gradients are summed on the owner alone, in the order of ranks and positions,
        bit for bit as in one process.
    :raises ValueError: a size is less than 1, ``pad_idx`` is not a row of the table, or an option
        has an invalid value.
    """

    shard_dim = 0
    outputs = ("own",)

    def __init__(
        self,
        gang: Gang,
        num_embeddings: int,
        embed_dim: int,
        pad_idx: int | None = None,
        *,
        init_fn: InitFn | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        placement: Placement = "block",
        grad_reduction: GradReduction = "sum",
        dedup: Dedup = "auto",
        sparse: bool = False,
        reuse_grad: bool = False,
        scale: float | Tensor | None = None,
        train_rows: Rows | None = None,
    ) -> None:
        if placement not in get_args(Placement):
            raise ValueError(
                f"`placement` must be one of {get_args(Placement)}, but is {placement!r} instead."
            )
        self._placement = placement  # The constructor of `Table` needs it for the partition.
        super().__init__(
            gang,
            num_embeddings,
            embed_dim,
            pad_idx,
            init_fn=init_fn,
            device=device,
            dtype=dtype,
            output="own",
            dedup=dedup,
            sparse=sparse,
            reuse_grad=reuse_grad,
            scale=scale,
            train_rows=train_rows,
            check_ids=False,
        )
        self.grad_reduction = grad_reduction

    @property
    def placement(self) -> Placement:
        """Which rows a rank holds."""
        return self._placement

    @property
    def partition(self) -> Partition:
        return Partition(self.num_embeddings, self.gang.size, cyclic=self._placement == "cyclic")

    @classmethod
    def from_embedding(  # type: ignore[override]
        cls,
        embed: StandardEmbedding,
        gang: Gang,
        *,
        placement: Placement = "block",
        grad_reduction: GradReduction = "sum",
        dedup: Dedup = "auto",
    ) -> Self:
        """Shards ``embed`` over ``gang``. Sends nothing: each rank copies its rows out of its own
        whole table, on the same device.

        :param embed: the embedding to shard, the same on every rank.
        :param gang: the gang to shard it over.
        :param placement: as in the constructor; ``grad_reduction`` and ``dedup`` likewise.
        """
        options = {"placement": placement, "grad_reduction": grad_reduction, "dedup": dedup}
        return cls._cut(embed, gang, **options)
