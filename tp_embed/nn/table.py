"""Base classes of the embeddings: modules that hold one block of a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from tp_embed.batch_layout import BatchLayout
from tp_embed.gang import Gang
from tp_embed.lookup.exchange import Dedup, Place
from tp_embed.lookup.options import LookupOptions, Output
from tp_embed.lookup.request import Lookup, look_up
from tp_embed.lookup.train_rows import Rows, as_rows
from tp_embed.mapped.store import rewriting, store_of
from tp_embed.nn import init
from tp_embed.nn.gang_layer import GangLayer
from tp_embed.nn.init_whole import fill_from_whole_table
from tp_embed.partition import Partition

InitFn = Callable[[Any], object]


class Embedding(Module, ABC):
    """Stores embeddings of a fixed dictionary and size.

    :param num_embeddings: V, the number of rows of the table; at least 1.
    :param embed_dim: E, the size of each embedding; at least 1.
    :param pad_idx: if not ``None``, the row that is initialized to zero and gets no gradient;
        negative values count from the end.
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

    # The attributes of `torch.nn.Embedding`.
    max_norm = property(lambda self: None)
    norm_type = property(lambda self: 2.0)
    scale_grad_by_freq = property(lambda self: False)
    embedding_dim = property(lambda self: self.embed_dim)
    padding_idx = property(lambda self: self.pad_idx)

    @abstractmethod
    def forward(self, x: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """
        :param x: the embedding indices. *Shape:* any. *Dtype:* any integer.
        :param layout: the layout of ``x``. Padded positions are neither looked up nor sent; they
            return zeros, get no gradient, and are not range-checked.
        :returns: the embeddings. *Shape:* :math:`(*,E)`, where :math:`*` is the shape of ``x``.
        :raises TypeError: ``x`` does not have an integer dtype.
        :raises ValueError: ``layout`` has another shape.
        :raises IndexError: an index is not a row of the table.
        """


def _kept_by_lookups(name: str) -> Any:
    """Returns a property for the attribute ``name``; assigning it rebuilds the lookup."""

    def assign(table: Table, value: Any) -> None:
        setattr(table, name, value)
        if hasattr(table, "_lookup"):
            table._prepare()

    return property(lambda table: getattr(table, name), assign)


def _option(name: str) -> Any:
    """Returns a property for the lookup option ``name``; assigning it rebuilds the lookup."""

    def assign(table: Table, value: Any) -> None:
        table.options = replace(table.options, **{name: value})
        table._prepare()

    return property(lambda table: getattr(table.options, name), assign)


class Table(GangLayer, Embedding):
    """An embedding whose only Parameter, ``weight``, is a block of the table.

    ``shard_dim`` is the sharded dimension, 0 for rows and 1 for columns; ``outputs`` are the
    supported output layouts.
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
        output: Output | Literal["own"] = "replicated",
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
        if train_rows is not None:
            train_rows = as_rows(train_rows, num_embeddings)
        self.init_fn = init_fn
        self.gang = gang
        self.options = LookupOptions(
            output, dedup, sparse, reuse_grad, scale, train_rows, check_ids
        )
        self._prepare()
        shape = len(self.rows), len(self.columns)
        if device is None and torch.get_default_device().type == "cpu":
            device = gang.device
        self.weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._adopt()
        self.reset_parameters()

    def _prepare(self) -> None:
        """Builds the lookup, again whenever the gang, the pad row or an option is assigned."""
        options, kind = self.options, type(self).__name__
        if options.output not in self.outputs:
            hint = "" if self.shard_dim else " `ShardedEmbedding` gives 'shard', its own columns."
            if options.output == "own":
                hint = " `RowWiseEmbedding` gives each rank the rows of its own ids."
            raise ValueError(
                f"`output` must be one of {self.outputs} for a `{kind}`, "
                f"but is {options.output!r} instead.{hint}"
            )
        weight = getattr(self, "weight", None)
        if weight is not None and not options.sparse and store_of(weight) is not None:
            raise ValueError(
                "`sparse` must be True for a table in memory-mapped files, whose dense gradient "
                "would take as much memory, but is False instead."
            )
        first = self.rows.start if self.shard_dim else self.partition.position(self.rows.start)
        held = range(first, first + len(self.rows))
        place = Place(self.gang, self.partition, self.shard_dim, held, self.columns)
        name = f"{kind}({self.num_embeddings}, {self.embed_dim}, {options.output!r})"
        self._lookup = Lookup(place, self.pad_idx, options, name)

    # Not `__setattr__`: FSDP2 would register Parameters again in each step.
    gang = _kept_by_lookups("_gang")
    pad_idx = _kept_by_lookups("_pad_idx")
    num_embeddings = _kept_by_lookups("_num_embeddings")
    embed_dim = _kept_by_lookups("_embed_dim")
    output = _option("output")
    dedup = _option("dedup")
    sparse = _option("sparse")
    reuse_grad = _option("reuse_grad")
    scale = _option("scale")
    train_rows = _option("train_rows")
    grad_reduction = _option("grad_reduction")

    @property
    def partition(self) -> Partition:
        """How the sharded dimension is split over the gang."""
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
        """Initializes the table with ``init_fn``, or from the standard normal distribution as
        :class:`torch.nn.Embedding` does.

        Collective: all ranks of the gang must call it. The functions of :mod:`tp_embed.nn.init`,
        and others marked with :func:`tp_embed.nn.init.blockwise`, fill each rank's block in place
        and send 8 bytes. Any other function runs on rank 0 of the gang with a whole
        :class:`StandardEmbedding`, with torch's generators seeded for this table, and every rank
        receives its block: V x E items are broadcast, in chunks, and rank 0 holds the whole table
        meanwhile. The pad row is zero before the function, and is zeroed again if the function drew
        random numbers with torch; a function that copies a pretrained table keeps its pad row.
        Does nothing on ``meta``.

        :raises ValueError: ``init_fn`` has changed the shape, dtype or device of the weight.
        :raises GangError: ``init_fn`` failed on rank 0 and this is another rank.
        """
        if self.weight.is_meta:
            return
        init_fn = self.init_fn or init.normal
        with rewriting(self.weight):
            if init.is_blockwise(init_fn):
                init_fn(self)
            else:
                fill_from_whole_table(self, init_fn, self._empty_whole)

    @abstractmethod
    def _empty_whole(self, device: torch.device | str | None = None) -> Table:
        """Returns the whole table on one rank, not initialized."""

    @property
    def embed_scale(self) -> float | Tensor:
        """The name of ``scale`` in transformers; missing if ``scale`` is ``None``."""
        scale: float | Tensor | None = self.scale
        if scale is None:
            raise AttributeError(f"This `{type(self).__name__}` has no `scale`.")
        return scale

    @embed_scale.setter
    def embed_scale(self, scale: float | Tensor) -> None:
        self.scale = scale

    def forward(self, x: Tensor, layout: BatchLayout | None = None) -> Tensor:
        self._check_input(x)
        self._mask_gradient()
        output = look_up(self._lookup, self.weight, x, layout)
        scale = self.scale
        if scale is None:
            return output
        return output * (scale.to(output.dtype) if isinstance(scale, Tensor) else scale)

    def __getstate__(self) -> dict[str, Any]:
        if store_of(self.weight) is not None:
            raise ValueError(
                "A table in memory-mapped files must not be copied or pickled, but is. Use "
                "`MappedTable.snapshot()`, save its `state_dict()`, or copy the model before the "
                "table is mapped."
            )
        return {key: value for key, value in self.__dict__.items() if key != "_lookup"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()  # A copy is a separate table.

    def check_ids(self) -> None:
        """Waits until the ids of all forwards so far are checked; on an accelerator, checks run in
        the background. See :class:`tp_embed.lookup.ids.IdCheck`.

        :raises IndexError, GangError: as the forward.
        """
        self._lookup.flush()

    def extra_repr(self) -> str:
        parts = [str(self.num_embeddings), str(self.embed_dim)]
        if self.pad_idx is not None:
            parts.append(f"pad_idx={self.pad_idx}")
        if self.gang.size > 1:
            parts.append(self._shard_repr(self.shard_dim, self.partition))
        if self.output not in ("replicated", "own"):
            parts.append(f"output={self.output!r}")
        if self.grad_reduction != "sum":
            parts.append(f"grad_reduction={self.grad_reduction!r}")
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
