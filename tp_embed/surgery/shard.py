"""Replaces the embedding tables of a model by sharded ones, with the heads tied to them."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from tp_embed.gang import Gang
from tp_embed.gang.agreement import check_agreement, raise_together
from tp_embed.lookup.exchange import Dedup
from tp_embed.lookup.options import Output
from tp_embed.lookup.same_ids import check_interval
from tp_embed.lookup.train_rows import Rows
from tp_embed.nn.embedding import (
    InitFn,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.nn.head import OutputHead
from tp_embed.parameter.optimizers import check_optimizer, forget, mark_replaced
from tp_embed.surgery.carry import (
    LostInit,
    carry_module,
    carry_parameter,
    check_module,
    check_parameter,
    retire,
)
from tp_embed.surgery.discovery import (
    Place,
    TableGroup,
    check_shardable,
    check_weight,
    output_scale,
    skip,
)
from tp_embed.surgery.optimizer import (
    Groups,
    Shard,
    check_groups,
    repoint_groups,
    repoint_optimizer,
)
from tp_embed.surgery.strategies import Choices, Strategy, choose_rows, choose_strategies


@dataclass(frozen=True)
class TableReport:
    """What became of one table: its name in the model, logical sizes, the strategy, the names of
    the heads and tables that share it, its bytes on one rank now and before, and what else there
    is to say."""

    name: str
    num_embeddings: int
    embed_dim: int
    strategy: str
    tied: tuple[str, ...]
    bytes_per_rank: int
    bytes_replicated: int
    note: str = ""

    def __str__(self) -> str:
        tied = f", tied to {', '.join(self.tied)}" if self.tied else ""
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.name} ({self.num_embeddings} x {self.embed_dim}): strategy '{self.strategy}'"
            f"{note}{tied}; {self.bytes_per_rank / 2**20:.2f} MiB on this rank, "
            f"{self.bytes_replicated / 2**20:.2f} MiB if replicated"
        )


@dataclass(frozen=True)
class ShardingReport:
    """What :func:`shard_embeddings` did, table by table."""

    tables: tuple[TableReport, ...]

    @property
    def bytes_per_rank(self) -> int:
        """The bytes of all tables on this rank. Gradients and optimizer states come on top, and
        shrink alike."""
        return sum(table.bytes_per_rank for table in self.tables)

    @property
    def bytes_replicated(self) -> int:
        """The bytes that the same tables take where every rank holds all of them."""
        return sum(table.bytes_replicated for table in self.tables)

    def __str__(self) -> str:
        if not self.tables:
            return "no embedding tables"
        saved = self.bytes_replicated - self.bytes_per_rank
        summary = (
            f"saves {saved / 2**20:.2f} of {self.bytes_replicated / 2**20:.2f} MiB on this rank, "
            "and the same share of gradients, master copies and optimizer states"
        )
        return "\n".join([*map(str, self.tables), summary])


def shard_embeddings(
    model: Module,
    gang: Gang,
    *,
    strategy: Strategy = "auto",
    rules: Mapping[str, Strategy] | None = None,
    tie_head: bool = True,
    shard_head: bool = True,
    output: Output = "replicated",
    dedup: Dedup = "auto",
    sparse: bool | None = None,
    reuse_grad: bool | None = None,
    check_ids: int | None = None,
    init_fn: InitFn | None = None,
    train_rows: Mapping[str, Rows] | None = None,
    optimizer: Optimizer | None = None,
    parameters: Groups | None = None,
) -> ShardingReport:
    """Replaces every ``nn.Embedding`` and :class:`StandardEmbedding` of ``model``, in place, by one
    that is sharded over ``gang``; a ``nn.Linear`` that shares the table becomes an
    :class:`OutputHead`. ``requires_grad``, dtype, device, the hooks and attributes of the modules
    and the plain attributes of the Parameter stay. So do the values, unless there is an
    ``init_fn``: every rank cuts its block out of the table that it has. A module that was replaced
    raises when it is called.

    All ranks of the gang have to call it: they compare, with an all-gather of about a kilobyte,
    what they are about to do. Call it before an engine is built, which would keep the old
    Parameters; an optimizer that is there already is passed as ``optimizer``.

    :param model: the model. It is left as it was if an error is raised.
    :param gang: the tensor-parallel gang.
    :param strategy: ``"embed"`` shards the embedding dimension, ``"vocab"`` the vocabulary,
        ``"none"`` leaves tables as they are. ``"auto"`` takes ``"vocab"`` for tables that are tied
        to a head, whose logits are then gathered and not summed, and else ``"embed"``, which
        sends half of what ``"vocab"`` does.
    :param rules: strategies for the tables of which a name matches a pattern as in
        :mod:`fnmatch`, the first match counts: ``{"*.wpe": "none"}``. Embeddings that share a
        Parameter are one table with several names. The full name of a ``nn.Linear`` that is tied
        to no table makes it a table of its own: an output head.
    :param tie_head: whether tables that are tied to a head are sharded, together with it; if not,
        they are left whole unless a rule names them.
    :param shard_head: whether the output head that ``model.get_output_embeddings()`` names is
        sharded if it is tied to no table: over the vocabulary, unless a rule names it.
    :param output: the layout of what all embeddings give, those of positions too, see
        :class:`ShardedEmbedding`. For anything but ``"replicated"`` the model has to be written for
        it. Heads, tied or not, take hidden states that are whole and the same on every rank.
    :param dedup: whether a row is sent once that several positions want, see
        :class:`ShardedEmbedding`.
    :param sparse: whether gradients are sparse; if ``None``, where they were.
    :param reuse_grad: whether dense gradients are put into the same memory, one after the other,
        see :class:`ShardedEmbedding`, which also says when not to; if ``None``, where they were.
    :param check_ids: at which lookups ranks compare their ids, see :class:`ShardedEmbedding`.
    :param init_fn: initializes every table anew, those that are not sharded too, to the same values
        for each strategy. Heads that are tied to no table keep their values.
    :param train_rows: the rows that get a gradient, for tables of which a name matches a pattern:
        ``{"*.embed_tokens": slice(32000, None)}``; see :class:`StandardEmbedding`.
    :param optimizer: an optimizer over the Parameters of ``model``; it gets the new ones, with its
        states cut to the shards.
    :param parameters: a list of Parameters or parameter groups; likewise, in place.
    :raises ValueError: a strategy, rule or option is unknown, a rule matches no table, or a table
        cannot be sharded: it has options, ties, or hooks and attributes of its Parameter that
        would be lost; see :func:`tp_embed.shardwise` for hooks. ``optimizer`` looks at whole
        matrices, as Adafactor, LAMB and Muon do, or has states that cannot be cut.
    :raises TypeError: a table is of a class with a ``forward`` of its own, which would be lost.
        ``parameters`` is no list.
    :raises IndexError: ``train_rows`` names a row that a table does not have.
    :raises GangError: the ranks disagree on strategies, sizes, dtypes, or the values of a table.
    """

    def check() -> tuple[Choices, list[Tensor | None]]:
        if optimizer is not None:
            check_groups("optimizer.param_groups", optimizer.param_groups, model)
        if parameters is not None:
            check_groups("parameters", parameters, model)
        found = choose_strategies(model, strategy, rules, tie_head, shard_head, gang.size, output)
        if optimizer is not None and gang.size > 1:
            check_optimizer(optimizer, [g.weight for g, chosen in found if chosen != "none"])
        return found, choose_rows(found, train_rows)

    choices, rows = raise_together(gang, check)
    options = _Options(output, dedup, sparse, reuse_grad, init_fn, check_ids)
    check_agreement(gang, options.facts() | _facts(gang, choices, rows, init_fn))

    def check_tables() -> None:
        for group, chosen in choices:
            with gang.whole(*group.parameters):
                if chosen != "none":
                    check_shardable(group)
                    _check_carried(group, gang)
                    for embedding in group.embeddings:
                        _as_standard(embedding, options)
                elif init_fn is not None:
                    check_weight(group)
        if integration := _of_transformers():
            sharded = [group for group, chosen in choices if chosen != "none"]
            integration.check_adapters(
                model, {module for group in sharded for module in (*group.embeddings, *group.heads)}
            )

    raise_together(gang, check_tables)
    with gang.sharding(model):
        # All that can fail comes before all that changes the model.
        changes = []
        for (group, chosen), train in zip(choices, rows, strict=True):
            with gang.whole(*group.parameters):
                of_group = replace(options, train_rows=train)
                changes.append(_Change.plan(group, chosen, gang, of_group))
        shards = {change.group.weight: change.shard for change in changes if change.shard}
        report = ShardingReport(tuple(change.carry_out(gang) for change in changes))
    for whole, shard in shards.items():
        if shard.parameter is not whole:
            mark_replaced(whole)
    forget()
    if optimizer is not None:
        repoint_optimizer(optimizer, shards)
    if parameters is not None:
        repoint_groups(parameters, shards)
    # Models of transformers save and resize their tables themselves, and would save one shard.
    if integration := _of_transformers():
        integration.adapt(model)
    return report


def _of_transformers() -> Any:
    """What there is to do for models of transformers, if there may be any."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    return import_module("tp_embed.integrations.transformers")


def _check_carried(group: TableGroup, gang: Gang) -> None:
    name = group.names[0]
    if gang.size > 1:  # Else the block is the whole table.
        check_parameter(group.weight, name, skip(name))
    for module in (*group.embeddings, *group.heads):
        check_module(module, name, skip(name))


def _facts(
    gang: Gang, choices: Choices, rows: list[Tensor | None], init_fn: InitFn | None
) -> dict[str, object]:
    """What has to be the same on every rank of ``gang``."""
    facts: dict[str, object] = {"whether there is an `init_fn`": init_fn is not None}
    for (group, chosen), train in zip(choices, rows, strict=True):
        name = group.names[0]
        facts[f"the rows of '{name}' that train"] = "all" if train is None else _digest(train)
        facts[f"the strategy for '{name}'"] = chosen
        facts[f"the classes at '{name}'"] = [
            type(module).__name__ for module in (*group.embeddings, *group.heads)
        ]
        with gang.whole(group.weight):
            facts[f"the shape of '{name}'"] = tuple(group.weight.shape)
            facts[f"the dtype of '{name}'"] = group.weight.dtype
            if init_fn is None and chosen != "none":
                facts[f"the values of '{name}' (a checksum)"] = _checksum(group.weight)
    return facts


def _checksum(table: Tensor) -> str | None:
    """Of some items: tables that were drawn from different seeds differ in all of them."""
    if table.is_meta or not table.numel():
        return None
    return _digest(table.detach().flatten()[:: max(1, table.numel() // 256)].cpu())


def _digest(items: Tensor) -> str:
    data = items.contiguous().view(torch.uint8).tolist()
    return hashlib.blake2b(bytes(data), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Options:
    """What the new tables are made with; of ``sparse`` and ``reuse_grad``, ``None`` is what they
    were made with."""

    output: Output = "replicated"
    dedup: Dedup = "auto"
    sparse: bool | None = None
    reuse_grad: bool | None = None
    init_fn: InitFn | None = None
    check_ids: int | None = None
    train_rows: Tensor | None = None

    def facts(self) -> dict[str, object]:
        """What has to be the same on every rank of the gang."""
        names = "output", "dedup", "sparse", "reuse_grad"
        facts: dict[str, object] = {f"`{name}`": getattr(self, name) for name in names}
        return facts | {"`check_ids`": check_interval(self.check_ids)}


@dataclass(frozen=True)
class _Change:
    """What is to become of a table: new modules for old ones, or, if there are none, new values."""

    group: TableGroup
    strategy: Strategy
    shape: tuple[int, int]
    shard: Shard | None
    modules: list[tuple[Module, Module, list[Place]]]
    values: Tensor | None = None

    @staticmethod
    def plan(group: TableGroup, strategy: Strategy, gang: Gang, options: _Options) -> _Change:
        num_rows, dim = group.weight.shape
        if strategy == "none":
            values = None
            if options.init_fn is not None and group.embeddings:
                # Over the gang, so that its ranks agree.
                drawn = _Options(init_fn=options.init_fn)
                table = _as_standard(next(iter(group.embeddings)), drawn)
                values = _shard(table, "embed", gang, drawn).to_embedding().weight.detach()
            return _Change(group, strategy, (num_rows, dim), None, [], values)

        first: ShardedEmbedding | VocabShardedEmbedding | None = None
        modules: list[tuple[Module, Module, list[Place]]] = []
        for embedding, places in group.embeddings.items():
            table = _as_standard(embedding, options)
            if first is None:
                new = first = _shard(table, strategy, gang, options)
            else:
                new = _shard(table, strategy, gang, replace(options, init_fn=None))
                new.weight = first.weight
            modules.append((embedding, new, places))
        if first is None:  # A head that is tied to no table.
            of_head = _Options(train_rows=options.train_rows)
            table = _as_standard(next(iter(group.heads)), of_head)
            first = _shard(table, strategy, gang, _Options())
        for head, places in group.heads.items():
            modules.append((head, OutputHead(first, bias=head.bias), places))
        shard = Shard(first.weight, first.rows, first.columns)
        return _Change(group, strategy, (num_rows, dim), shard, modules)

    def carry_out(self, gang: Gang) -> TableReport:
        for old, new, places in self.modules:
            carry_module(old, new)
            for place in places:
                setattr(place.parent, place.attribute, new)
            retire(old, new, places[0].name)
        weight = self.group.weight
        if self.shard is not None:
            shard_dim = 0 if self.strategy == "vocab" else 1
            carry_parameter(weight, self.shard, shard_dim, self.group.names[0])
        if self.values is not None:
            with torch.no_grad(), gang.whole(weight, modified=True):
                weight.copy_(self.values)
        bytes_replicated = math.prod(self.shape) * weight.element_size()
        return TableReport(
            self.group.names[0],
            *self.shape,
            self.strategy,
            tied=tuple(self.group.shared_with),
            bytes_per_rank=self.shard.parameter.nbytes if self.shard else bytes_replicated,
            bytes_replicated=bytes_replicated,
        )


def _shard(
    table: StandardEmbedding, strategy: Strategy, gang: Gang, options: _Options
) -> ShardedEmbedding | VocabShardedEmbedding:
    kind = VocabShardedEmbedding if strategy == "vocab" else ShardedEmbedding
    if options.init_fn is None:
        return kind.from_embedding(
            table, gang, output=options.output, dedup=options.dedup, check_ids=options.check_ids
        )
    new = kind(
        gang,
        table.num_embeddings,
        table.embed_dim,
        table.pad_idx,
        init_fn=options.init_fn,
        device=table.weight.device,
        dtype=table.weight.dtype,
        output=options.output,
        dedup=options.dedup,
        sparse=table.sparse,
        reuse_grad=table.reuse_grad,
        scale=table.scale,
        check_ids=options.check_ids,
        train_rows=table.train_rows,
    )
    new.weight.requires_grad_(table.weight.requires_grad)
    return new


def _as_standard(module: Module, options: _Options) -> StandardEmbedding:
    """The table of ``module`` as a :class:`StandardEmbedding` of these options, with the same
    Parameter."""
    pad_idx, init_fn, sparse, reuse_grad, scale = None, None, False, False, None
    if isinstance(module, StandardEmbedding):
        pad_idx, init_fn, scale = module.pad_idx, module.init_fn, module.scale
        sparse, reuse_grad = module.sparse, module.reuse_grad
    elif isinstance(module, nn.Embedding):
        pad_idx, sparse, scale = module.padding_idx, module.sparse, output_scale(module)
        if type(module).reset_parameters is not nn.Embedding.reset_parameters:
            init_fn = LostInit(type(module).__name__)
    weight = cast(Parameter, module.weight)
    num_rows, dim = weight.shape
    standard = StandardEmbedding(
        num_rows,
        dim,
        pad_idx,
        init_fn=init_fn,
        device="meta",
        dtype=weight.dtype,
        sparse=sparse if options.sparse is None else options.sparse,
        reuse_grad=reuse_grad if options.reuse_grad is None else options.reuse_grad,
        scale=scale,
        train_rows=options.train_rows,
    )
    standard.weight = weight
    return standard.train(module.training)
