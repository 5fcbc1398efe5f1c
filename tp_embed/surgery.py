"""Replaces the embedding tables of a model by sharded ones, with the heads tied to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from tp_embed.embedding import (
    InitFn,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.gang import Gang
from tp_embed.head import TiedHead
from tp_embed.tables import Place, TableGroup, check_shardable, check_weight, find_tables

Strategy = Literal["auto", "embed", "vocab", "none"]

_STRATEGIES = get_args(Strategy)

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class TableReport:
    """What became of one table: its name in the model, logical sizes, the strategy, the names of
    the heads and tables that share it, and its bytes on one rank now and before."""

    name: str
    num_embeddings: int
    embed_dim: int
    strategy: str
    tied: tuple[str, ...]
    bytes_per_rank: int
    bytes_replicated: int

    def __str__(self) -> str:
        tied = f", tied to {', '.join(self.tied)}" if self.tied else ""
        return (
            f"{self.name} ({self.num_embeddings} x {self.embed_dim}): strategy '{self.strategy}'"
            f"{tied}; {self.bytes_per_rank / 2**20:.2f} MiB on this rank, "
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
        return "\n".join(map(str, self.tables)) or "no embedding tables"


def shard_embeddings(
    model: Module,
    gang: Gang,
    *,
    strategy: Strategy = "auto",
    rules: Mapping[str, Strategy] | None = None,
    init_fn: InitFn | None = None,
) -> ShardingReport:
    """Replaces every ``nn.Embedding`` and :class:`StandardEmbedding` of ``model``, in place, by one
    that is sharded over ``gang``; a ``nn.Linear`` that shares the table becomes a
    :class:`TiedHead`. ``requires_grad``, dtype, device and hooks stay. So do the values, unless
    there is an ``init_fn``: every rank cuts its block out of the table that it has, and nothing is
    sent.

    Call it before an optimizer or an engine is built, which would keep the old Parameters.

    :param model: the model. It is left as it was if an error is raised.
    :param gang: the tensor-parallel gang.
    :param strategy: ``"embed"`` shards the embedding dimension, ``"vocab"`` the vocabulary,
        ``"none"`` leaves tables as they are. ``"auto"`` takes ``"vocab"`` for tables that are tied
        to a head, whose logits are then gathered and not summed, and else ``"embed"``, which
        sends half of what ``"vocab"`` does.
    :param rules: strategies for the tables of which a name matches a pattern as in
        :mod:`fnmatch`, the first match counts: ``{"*.wpe": "none"}``. Embeddings that share a
        Parameter are one table with several names.
    :param init_fn: initializes every table anew, those that are not sharded too, to the same values
        for each strategy; all ranks of the gang have to call then.
    :raises ValueError: a strategy or rule is unknown, a rule matches no table, or a table cannot
        be sharded: it has options or ties that would be lost.
    :raises TypeError: a table is of a class with a ``forward`` of its own, which would be lost.
    """
    rules = dict(rules or {})
    for name, value in [("strategy", strategy), *((f"rules[{k!r}]", v) for k, v in rules.items())]:
        if value not in _STRATEGIES:
            raise ValueError(f"`{name}` must be one of {_STRATEGIES}, but is {value!r} instead.")

    groups = find_tables(model)
    _check_rules(rules, groups)
    choices = [(group, _choose(group, strategy, rules)) for group in groups]
    for group, chosen in choices:
        if chosen != "none":
            check_shardable(group)
        elif init_fn is not None:
            check_weight(group)

    # All that can fail comes before all that changes the model.
    changes = [_Change.plan(group, chosen, gang, init_fn) for group, chosen in choices]
    return ShardingReport(tuple(change.carry_out() for change in changes))


def _choose(group: TableGroup, strategy: Strategy, rules: dict[str, Strategy]) -> Strategy:
    for pattern, chosen in rules.items():
        if _matches(pattern, group):
            strategy = chosen
            break
    if strategy != "auto":
        return strategy
    return "vocab" if group.heads else "embed"


def _matches(pattern: str, group: TableGroup) -> bool:
    return any(fnmatchcase(name, pattern) for name in group.embedding_names)


def _check_rules(rules: dict[str, Strategy], groups: list[TableGroup]) -> None:
    unmatched = [p for p in rules if not any(_matches(p, group) for group in groups)]
    if unmatched:
        names = [name for group in groups for name in group.embedding_names]
        raise ValueError(
            f"`rules` must match the name of a table each, but {unmatched} match none of {names}."
        )


@dataclass(frozen=True)
class _Change:
    """What is to become of a table: new modules for old ones, or, if there are none, new values."""

    group: TableGroup
    strategy: Strategy
    weight: Tensor
    modules: list[tuple[Module, Module, list[Place]]]
    values: Tensor | None = None

    @staticmethod
    def plan(group: TableGroup, strategy: Strategy, gang: Gang, init_fn: InitFn | None) -> _Change:
        if strategy == "none":
            values = None
            if init_fn is not None:
                # Over the gang, so that its ranks agree.
                table = _as_standard(next(iter(group.embeddings)))
                values = _shard(table, "embed", gang, init_fn).to_embedding().weight.detach()
            return _Change(group, strategy, group.weight, [], values)

        first: ShardedEmbedding | VocabShardedEmbedding | None = None
        modules: list[tuple[Module, Module, list[Place]]] = []
        for embedding, places in group.embeddings.items():
            table = _as_standard(embedding)
            if first is None:
                new = first = _shard(table, strategy, gang, init_fn)
            else:
                new = _shard(table, strategy, gang, None)
                new.weight = first.weight
            modules.append((embedding, new, places))
        assert first is not None  # A group has an embedding.
        for head, places in group.heads.items():
            modules.append((head, TiedHead(first, bias=head.bias), places))
        return _Change(group, strategy, first.weight, modules)

    def carry_out(self) -> TableReport:
        for old, new, places in self.modules:
            for hooks in _HOOKS:
                setattr(new, hooks, getattr(old, hooks))
            new.train(old.training)
            for place in places:
                setattr(place.parent, place.attribute, new)
        if self.values is not None:
            with torch.no_grad():
                self.weight.copy_(self.values)
        names = self.group.embedding_names
        num_embeddings, embed_dim = self.group.weight.shape
        return TableReport(
            names[0],
            num_embeddings,
            embed_dim,
            self.strategy,
            tied=(*names[1:], *self.group.head_names),
            bytes_per_rank=self.weight.nbytes,
            bytes_replicated=self.group.weight.nbytes,
        )


def _shard(
    table: StandardEmbedding, strategy: Strategy, gang: Gang, init_fn: InitFn | None
) -> ShardedEmbedding | VocabShardedEmbedding:
    kind = VocabShardedEmbedding if strategy == "vocab" else ShardedEmbedding
    if init_fn is None:
        return kind.from_embedding(table, gang)
    new = kind(
        gang,
        table.num_embeddings,
        table.embed_dim,
        table.pad_idx,
        init_fn=init_fn,
        device=table.weight.device,
        dtype=table.weight.dtype,
        sparse=table.sparse,
    )
    new.weight.requires_grad_(table.weight.requires_grad)
    return new


def _as_standard(module: Module) -> StandardEmbedding:
    """``module`` as a :class:`StandardEmbedding`, with the same Parameter."""
    if isinstance(module, StandardEmbedding):
        return module
    assert isinstance(module, nn.Embedding)
    standard = StandardEmbedding(
        module.num_embeddings,
        module.embedding_dim,
        module.padding_idx,
        device="meta",
        dtype=module.weight.dtype,
        sparse=module.sparse,
    )
    standard.weight = cast(Parameter, module.weight)
    return standard.train(module.training)
