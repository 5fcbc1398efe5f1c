"""The embedding classes: one table, whole or sharded over a gang.

All three share :class:`_Table`, which holds one block of the table, and differ in what a rank's
block is. :mod:`tp_embed.exchange` has what is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from tp_embed import init
from tp_embed.batch_layout import BatchLayout
from tp_embed.collectives import gather_table
from tp_embed.compiled import is_traced, look_up, register
from tp_embed.exchange import Dedup, Place, Staging
from tp_embed.fetch import Lookup, Output, Request, fetch, without_pad
from tp_embed.gang import FakeGang, Gang
from tp_embed.ids import IdCheck, as_indices
from tp_embed.layer import GangLayer
from tp_embed.lookup import GradBuffer, check_sparse, keep_coalesced
from tp_embed.partition import Partition
from tp_embed.same_ids import SameIds, check_interval
from tp_embed.sharded_parameter import local, unguarded
from tp_embed.train_rows import Rows, as_rows
from tp_embed.whole_init import fill_from_whole_table

InitFn = Callable[[Any], object]


class Embedding(Module, ABC):
    """Stores embeddings of a fixed dictionary and size.

    :param num_embeddings: V, the number of rows of the table; at least 1.
    :param embed_dim: E, the dimensionality of the embeddings; at least 1.
    :param pad_idx: if not ``None``, the row that is zero after initialisation and gets no
        gradient; negative values count from the end.
    :raises ValueError: a size is less than 1, or ``pad_idx`` is not a row of the table.
    :raises TypeError: a size is not an integer.
    """

    num_embeddings: int
    embed_dim: int
    pad_idx: int | None

    def __init__(self, num_embeddings: int, embed_dim: int, pad_idx: int | None = None) -> None:
        super().__init__()
        for name, size in (("num_embeddings", num_embeddings), ("embed_dim", embed_dim)):
            if not isinstance(size, int):
                raise TypeError(
                    f"`{name}` must be an integer, but is a `{type(size).__name__}` instead."
                )
            if size < 1:
                raise ValueError(
                    f"`{name}` must be greater than or equal to 1, but is {size} instead."
                )
        if pad_idx is not None:
            if not -num_embeddings <= pad_idx < num_embeddings:
                raise ValueError(
                    f"`pad_idx` must be in [-{num_embeddings}, {num_embeddings}) "
                    f"(num_embeddings), but is {pad_idx} instead."
                )
            pad_idx %= num_embeddings
        self.num_embeddings = num_embeddings
        self.embed_dim = embed_dim
        self.pad_idx = pad_idx

    # As `torch.nn.Embedding` calls them.
    max_norm = property(lambda self: None)
    norm_type = property(lambda self: 2.0)
    scale_grad_by_freq = property(lambda self: False)
    embedding_dim = property(lambda self: self.embed_dim)
    padding_idx = property(lambda self: self.pad_idx)

    @abstractmethod
    def forward(self, x: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """
        :param x: the embedding indices. *Shape:* any. *Dtype:* any integer.
        :param layout: of ``x``. What is padding by it is neither looked up nor sent, gives zeros
            and gets no gradient; its indices may be any.
        :returns: the embeddings. *Shape:* :math:`(*,E)`, where :math:`*` is the shape of ``x``.
        :raises TypeError: ``x`` does not have an integer dtype.
        :raises ValueError: ``layout`` is of another shape.
        :raises IndexError: an index is not a row of the table.
        """


class _Table(GangLayer, Embedding):
    """An embedding whose ``weight``, its one Parameter, is a block of the table.

    ``shard_dim`` is the dimension that is cut over the gang, 0 for the rows and 1 for the columns;
    ``outputs`` are the layouts that the class can give.
    """

    shard_dim: ClassVar[Literal[0, 1]]
    outputs: ClassVar[tuple[str, ...]]

    weight: Parameter

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
        output: Output = "replicated",
        dedup: Dedup = "auto",
        sparse: bool = False,
        reuse_grad: bool = False,
        scale: float | Tensor | None = None,
        train_rows: Rows | None = None,
        check_ids: int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embed_dim, pad_idx)
        if not isinstance(gang, Gang):
            raise TypeError(
                f"`gang` must be a `Gang`, but is a `{type(gang).__name__}` instead. Wrap a "
                "process group: `ProcessGroupGang(process_group, device)`."
            )
        if output not in self.outputs:
            hint = "" if self.shard_dim else " `ShardedEmbedding` gives 'shard', its own columns."
            raise ValueError(
                f"`output` must be one of {self.outputs} for a `{type(self).__name__}`, "
                f"but is {output!r} instead.{hint}"
            )
        if dedup not in ("auto", True, False):
            raise ValueError(f"`dedup` must be 'auto', True or False, but is {dedup!r} instead.")
        if sparse and reuse_grad:
            raise ValueError(
                "`reuse_grad` must be False with `sparse`, but is True instead: it is about dense "
                "gradients."
            )
        is_number = isinstance(scale, (int, float)) or (
            isinstance(scale, Tensor) and not scale.ndim
        )
        if scale is not None and not is_number:
            raise ValueError(
                f"`scale` must be a number or a tensor of the shape (), but is {scale!r} instead."
            )
        self.gang = gang
        self.init_fn = init_fn
        self.output = output
        self.dedup = dedup
        self.sparse = sparse
        self.scale = scale
        if train_rows is not None:
            self.train_rows = as_rows(train_rows, num_embeddings)
        self._id_check = IdCheck()
        self._same_ids = SameIds(check_interval(check_ids))
        self._staging = Staging()
        self._grad_buffer = GradBuffer() if reuse_grad else None
        shape = len(self.rows), len(self.columns)
        if device is None and torch.get_default_device().type == "cpu":
            device = gang.device
        self._handle = register(self)
        self.weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._adopt()
        self.reset_parameters()

    @property
    def partition(self) -> Partition:
        """How the sharded dimension is cut over the gang."""
        size = self.embed_dim if self.shard_dim else self.num_embeddings
        return Partition(size, self.gang.size)

    @property
    def rows(self) -> range:
        """The rows of the table that ``weight`` holds."""
        return range(self.num_embeddings) if self.shard_dim else self._own_range()

    @property
    def columns(self) -> range:
        """The columns of the table that ``weight`` holds."""
        return self._own_range() if self.shard_dim else range(self.embed_dim)

    def _own_range(self) -> range:
        return self.partition.shard(self.gang.rank)

    def reset_parameters(self) -> None:
        """Initializes the table, with ``init_fn`` or else as :class:`torch.nn.Embedding` does, from
        the standard normal distribution.

        All ranks of the gang have to call it. The functions of :mod:`tp_embed.init`, and others
        that are marked with :func:`tp_embed.init.blockwise`, fill each rank's block where it is;
        they send 8 bytes. Any other function is called on rank 0 of the gang with a whole
        :class:`StandardEmbedding`, under torch's generators seeded for this table, and every rank
        receives its block: V x E items are broadcast, in chunks, and rank 0 holds the whole table
        for that long. Its pad row is zero before the function, and again after one that drew random
        numbers with torch; a function that copies a pretrained table keeps the row that it copies.
        On ``meta`` nothing is done.

        :raises ValueError: ``init_fn`` has changed the shape, dtype or device of the weight.
        :raises GangError: ``init_fn`` failed on rank 0 and this is another rank.
        """
        if self.weight.is_meta:
            return
        init_fn = self.init_fn or init.normal
        if init.is_blockwise(init_fn):
            init_fn(self)
        else:
            whole = self if isinstance(self, StandardEmbedding) else None
            fill_from_whole_table(self, init_fn, lambda: whole or _empty_like(self))

    @property
    def embed_scale(self) -> float | Tensor:
        """``scale``, if there is one, as transformers calls it."""
        if self.scale is None:
            raise AttributeError(f"This `{type(self).__name__}` has no `scale`.")
        return self.scale

    @embed_scale.setter
    def embed_scale(self, scale: float | Tensor) -> None:
        self.scale = scale

    @property
    def reuse_grad(self) -> bool:
        """Whether dense gradients are put into the same memory, one after the other."""
        return self._grad_buffer is not None

    def forward(self, x: Tensor, layout: BatchLayout | None = None) -> Tensor:
        self._check_input(x)
        self._mask_gradient()
        ids = as_indices(x)
        real = None if layout is None else _real(ids, layout)
        if real is not None:
            ids = ids.masked_fill(~real, 0)
        if not is_traced(ids, self.weight):
            output = self._look_up(ids, real)
        elif self.sparse:
            output = _look_up_outside(self, ids, real)
        else:
            with unguarded():
                output = look_up(self.weight, ids, real, self._output_shape(ids), self._handle)
        if self.scale is None:
            return output
        if isinstance(self.scale, Tensor):
            return output * self.scale.to(output.dtype)
        return output * self.scale

    def _look_up(self, ids: Tensor, real: Tensor | None) -> Tensor:
        if self.sparse:
            check_sparse(self.weight)
            keep_coalesced(self.weight)
        return fetch(self.weight, ids, real, self._lookup(self._grad_buffer))

    def _compare(self, ids: Tensor, real: Tensor | None) -> None:
        """Raises on all ranks if the ids of one differ, before any looks at its own."""
        where = f"{type(self).__name__}({self.num_embeddings}, {self.embed_dim}, {self.output!r})"
        self._same_ids(ids, real, self.gang, where)

    def _lookup(self, grad_buffer: GradBuffer | None = None) -> Lookup:
        place = Place(self.gang, self.partition, self.shard_dim, self.rows, self.columns)
        return Lookup(
            place,
            self.pad_idx,
            self.output,
            self.dedup,
            self.sparse,
            self._staging,
            grad_buffer,
            self._id_check,
            self._compare,
        )

    def rows_in_graph(self, weight: Tensor, ids: Tensor, real: Tensor | None) -> Tensor:
        """The forward in a graph of torch.compile; see :mod:`tp_embed.compiled`."""
        self._compare(ids, real)
        return Request(ids, real, self._lookup()).rows(local(weight))

    def gradient_in_graph(self, grad: Tensor, ids: Tensor, real: Tensor | None) -> Tensor:
        """The backward. A graph may write to its gradients without torch counting it, so they
        are always in new memory."""
        return Request(ids, real, self._lookup()).gradient(grad)

    def without_pad_row(self, block: Tensor) -> Tensor:
        return without_pad(block, self._lookup())

    def _output_shape(self, ids: Tensor) -> list[int]:
        """The shape of the output. Sizes of ``ids`` may be symbols, which ``range`` does not
        take."""
        shape, width = list(ids.shape), self.embed_dim
        if self.output == "shard":
            width = len(self.columns)
        elif self.output == "sequence" and shape:
            block = -(-shape[-1] // self.gang.size)
            start = min(self.gang.rank * block, shape[-1])
            shape[-1] = min(start + block, shape[-1]) - start
        return [*shape, width]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = register(self)  # A copy is another table.

    def check_ids(self) -> None:
        """Waits until the ids of all forwards so far are checked, which on an accelerator is done
        in the background; see :class:`tp_embed.ids.IdCheck`.

        :raises IndexError, GangError: as the forward.
        """
        self._same_ids.flush()
        self._id_check.flush()

    def extra_repr(self) -> str:
        parts = [str(self.num_embeddings), str(self.embed_dim)]
        if self.pad_idx is not None:
            parts.append(f"pad_idx={self.pad_idx}")
        if self.gang.size > 1:
            parts.append(self._shard_repr(self.shard_dim, self.partition))
        if self.output != "replicated":
            parts.append(f"output={self.output!r}")
        if self.dedup != "auto":
            parts.append(f"dedup={self.dedup}")
        if self.sparse:
            parts.append("sparse=True")
        if self.reuse_grad:
            parts.append("reuse_grad=True")
        if self.scale is not None:
            parts.append(f"scale={float(self.scale):g}")
        if self.train_rows is not None:
            parts.append(f"train_rows={len(self.train_rows)}")
        parts.append(f"dtype={self.weight.dtype}, device='{self.weight.device}'")
        return ", ".join(parts)


def _real(ids: Tensor, layout: BatchLayout) -> Tensor | None:
    """Where there is no padding, if there is any. *Shape:* that of ``ids``. *Dtype:* bool."""
    positions = layout.position_indices
    if positions.shape != ids.shape:
        raise ValueError(
            f"`layout` must be of the shape of `x`, {tuple(ids.shape)}, but is of "
            f"{tuple(positions.shape)} instead. Make it with `BatchLayout.of(x, ...)`."
        )
    return positions.to(ids.device) >= 0 if layout.padded else None


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="A graph has no sparse gradients: pass `sparse=False`."
)
def _look_up_outside(embed: _Table, ids: Tensor, real: Tensor | None) -> Tensor:
    return embed._look_up(ids, real)


@final
class StandardEmbedding(_Table):
    """Stores embeddings of a fixed dictionary and size in an in-memory table.

    :param num_embeddings: V, the size of the embedding table.
    :param embed_dim: E, the dimensionality of returned embeddings.
    :param pad_idx: if not ``None``, the row that is zero after initialisation and gets no
        gradient, so that it is not updated during training; negative values count from the end.
    :param init_fn: the callable to initialize the table; it is given this embedding. If ``None``,
        the table is drawn from the standard normal distribution.
    :param device: the device of the table.
    :param dtype: the dtype of the table.
    :param sparse: whether ``weight.grad`` is a coalesced sparse tensor of the rows that were used.
    :param reuse_grad: whether dense gradients are put into the same memory, one after the other, of
        which only the rows that the last one had are cleared: the work of the backward no longer
        grows with V. The memory is kept between steps. A gradient that is still referred to is
        left alone, and one that was written to is cleared as a whole; but not if that was done
        through ``.data``, as DeepSpeed does at ZeRO 0 over several data-parallel ranks, or by a
        collective such as ``dist.all_reduce(weight.grad)``, neither of which torch counts: call
        ``torch.autograd.graph.increment_version(weight.grad)`` after it. On an accelerator it has
        no effect: another stream may still read the last gradient.
    :param scale: what the output is multiplied with, if not ``None``; a tensor *Shape:* :math:`()`
        is first rounded to the dtype of the output, as scaled embeddings of transformers are.
    :param train_rows: the rows that get a gradient; see :mod:`tp_embed.train_rows`.
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
            FakeGang("cpu"),  # Its size is 1, so nothing ever travels.
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


def _empty_like(embed: _Table, device: torch.device | str | None = None) -> StandardEmbedding:
    """A whole table like that of ``embed``, not initialised."""
    whole = StandardEmbedding(
        embed.num_embeddings,
        embed.embed_dim,
        embed.pad_idx,
        init_fn=embed.init_fn,
        device="meta",
        dtype=embed.weight.dtype,
        sparse=embed.sparse,
        reuse_grad=embed.reuse_grad,
        scale=embed.scale,
        train_rows=embed.train_rows,
    )
    whole.requires_grad_(embed.weight.requires_grad).train(embed.training)
    return whole.to_empty(device=device or embed.weight.device)


class _ShardedTable(_Table):
    """A table over a gang of any size, which comes from a whole one and can go back to one."""

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
        """Shards ``embed`` over ``gang``. Nothing is sent: each rank cuts its block out of the
        table that it has. The block is a copy, on the device of the table.

        :param embed: the embedding to shard, the same on every rank.
        :param gang: the gang over which to shard it.
        :param output: as in the constructor; ``dedup`` and ``check_ids`` likewise.
        """
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
            output=output,
            dedup=dedup,
            sparse=embed.sparse,
            reuse_grad=embed.reuse_grad,
            scale=embed.scale,
            train_rows=embed.train_rows,
            check_ids=check_ids,
        )
        sharded.requires_grad_(weight.requires_grad).train(embed.training)
        if weight.is_meta:
            return sharded
        sharded.to_empty(device=weight.device)
        rows, columns = sharded.rows, sharded.columns
        with torch.no_grad():
            sharded.weight.copy_(weight[rows.start : rows.stop, columns.start : columns.stop])
        return sharded

    def to_embedding(self, device: torch.device | str | None = None) -> StandardEmbedding:
        """Converts this instance to a :class:`StandardEmbedding`.

        All ranks of the gang have to call it, and each gets the whole table. Sends (P-1) times the
        largest block, in chunks.

        :param device: the device of the whole table; if ``None``, that of this one.
        """
        if self.weight.is_meta:
            if device is not None and torch.device(device).type != "meta":
                raise ValueError(
                    f"`device` must be 'meta' for a table on meta, but is '{device}' instead. "
                    "Initialize the table first: `to_empty(device=...)`, `reset_parameters()`."
                )
            return _empty_like(self)
        whole = _empty_like(self, device)
        with torch.no_grad():
            gather_table(
                whole.weight, local(self.weight), self.shard_dim, self.gang, self.partition
            )
        return whole


@final
class ShardedEmbedding(_ShardedTable):
    """Represents a :class:`StandardEmbedding` that is sharded across its embedding dimension.

    Every rank is given the same ids. What is sent, in items, for N ids of which U are distinct:

    - ``output="replicated"``: one all-gather in the forward, (P-1) U ceil(E/P).
    - ``output="sequence"``: one all-to-all in the forward, about (P-1)/P U E/P, and one in the
      backward, (P-1)/P N E/P.
    - ``output="shard"``: nothing.

    Without de-duplication it is N in the place of U. See :mod:`tp_embed.exchange`.

    :param gang: the gang over which to shard the embedding table.
    :param num_embeddings: V, the size of the embedding table.
    :param embed_dim: E, the dimensionality of returned embeddings; any size for any gang.
    :param pad_idx: if not ``None``, the row that is zero after initialisation and gets no
        gradient, so that it is not updated during training; negative values count from the end.
    :param init_fn: the callable to initialize the table, see :meth:`reset_parameters`.
    :param device: the device of the table; if ``None``, torch's default device, or that of the gang
        where that is the CPU.
    :param dtype: the dtype of the table.
    :param output: ``"replicated"``: each rank gets :math:`(*,E)`; ``"sequence"``: each rank gets
        its contiguous block of positions along the last dimension S of the indices, that of
        ``Partition(S, P).shard(rank)``: :math:`(*,S_{rank},E)`; ``"shard"``: each rank
        gets its own columns, :math:`(*,E_{rank})`, and nothing is sent but to compare ids: for
        lookups by one rank alone, or from several threads at once, pass ``check_ids=False``.
    :param dedup: whether a row is sent once that several positions want: ``True``, ``False``, or
        ``"auto"``: not on an accelerator, which would have to be asked how many there are, and
        else where at most 0.85 of the ids are distinct.
    :param sparse: whether ``weight.grad`` is a coalesced sparse tensor of the rows that were used.
    :param reuse_grad: whether dense gradients are put into the same memory, one after the other, of
        which only the rows that the last one had are cleared: the work of the backward no longer
        grows with V. The memory is kept between steps. A gradient that is still referred to is
        left alone, and one that was written to is cleared as a whole; but not if that was done
        through ``.data``, as DeepSpeed does at ZeRO 0 over several data-parallel ranks, or by a
        collective such as ``dist.all_reduce(weight.grad)``, neither of which torch counts: call
        ``torch.autograd.graph.increment_version(weight.grad)`` after it. On an accelerator it has
        no effect: another stream may still read the last gradient.
    :param scale: what the output is multiplied with, if not ``None``; a tensor *Shape:* :math:`()`
        is first rounded to the dtype of the output, as scaled embeddings of transformers are.
    :param train_rows: the rows that get a gradient; see :mod:`tp_embed.train_rows`.
    :param check_ids: at which lookups ranks compare their ids: the first one and each n-th after
        it, ``False`` for none; if ``None``, n = 128. See :class:`~tp_embed.same_ids.SameIds` for
        what is sent, and :func:`~tp_embed.same_ids.check_interval`.
    :raises ValueError: a size is less than 1, ``pad_idx`` is not a row of the table, or an option
        is something else.
    """

    shard_dim = 1
    outputs = ("replicated", "sequence", "shard")


@final
class VocabShardedEmbedding(_ShardedTable):
    """Represents a :class:`StandardEmbedding` that is sharded across its vocabulary.

    Every rank is given the same ids. What is sent, in items, for N ids of which U are distinct:

    - ``output="replicated"``: each distinct row once from its owner to all others in the forward,
      about (P-1)/P U E; without de-duplication one all-reduce, 2 (P-1)/P N E.
    - ``output="sequence"``: each distinct row of a rank's positions from its owner in the forward,
      about (P-1)/P U E/P; without de-duplication one reduce-scatter, (P-1)/P N E. One all-to-all
      in the backward, (P-1)/P N E/P.

    See :mod:`tp_embed.exchange`. It is what an output head that shares the table wants.

    :param gang: the gang over which to shard the embedding table.
    :param num_embeddings: V, the size of the embedding table; any size for any gang.
    :param embed_dim: E, the dimensionality of returned embeddings.
    :param pad_idx: if not ``None``, the row that is zero after initialisation and gets no
        gradient, so that it is not updated during training; negative values count from the end.
    :param init_fn: the callable to initialize the table, see :meth:`reset_parameters`.
    :param device: the device of the table; if ``None``, torch's default device, or that of the gang
        where that is the CPU.
    :param dtype: the dtype of the table.
    :param output: ``"replicated"``: each rank gets :math:`(*,E)`; ``"sequence"``: each rank gets
        its contiguous block of positions along the last dimension S of the indices, that of
        ``Partition(S, P).shard(rank)``: :math:`(*,S_{rank},E)`.
    :param dedup: whether a row is sent once that several positions want: ``True``, ``False``, or
        ``"auto"``: not on an accelerator, which would have to be asked how many there are.
    :param sparse: whether ``weight.grad`` is a coalesced sparse tensor of the rows that were used.
    :param reuse_grad: whether dense gradients are put into the same memory, one after the other, of
        which only the rows that the last one had are cleared: the work of the backward no longer
        grows with V. The memory is kept between steps. A gradient that is still referred to is
        left alone, and one that was written to is cleared as a whole; but not if that was done
        through ``.data``, as DeepSpeed does at ZeRO 0 over several data-parallel ranks, or by a
        collective such as ``dist.all_reduce(weight.grad)``, neither of which torch counts: call
        ``torch.autograd.graph.increment_version(weight.grad)`` after it. On an accelerator it has
        no effect: another stream may still read the last gradient.
    :param scale: what the output is multiplied with, if not ``None``; a tensor *Shape:* :math:`()`
        is first rounded to the dtype of the output, as scaled embeddings of transformers are.
    :param train_rows: the rows that get a gradient; see :mod:`tp_embed.train_rows`.
    :param check_ids: at which lookups ranks compare their ids: the first one and each n-th after
        it, ``False`` for none; if ``None``, n = 128. See :class:`~tp_embed.same_ids.SameIds` for
        what is sent, and :func:`~tp_embed.same_ids.check_interval`.
    :raises ValueError: a size is less than 1, ``pad_idx`` is not a row of the table, or an option
        is something else.
    """

    shard_dim = 0
    outputs = ("replicated", "sequence")
