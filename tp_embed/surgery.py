"""Finds the embedding tables of a model and replaces them by sharded ones, with what is tied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import nn
from torch.nn import Module, Parameter

from tp_embed.embedding import (
    InitFn,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.gang import Gang
from tp_embed.head import TiedHead

Strategy = Literal["auto", "embed", "vocab", "none"]

_STRATEGIES = ("auto", "embed", "vocab", "none")

_Sharded = ShardedEmbedding | VocabShardedEmbedding

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
    :param rules: strategies for the tables whose name matches a pattern as in
        :mod:`fnmatch`, the first match counts: ``{"*.wpe": "none"}``.
    :param init_fn: initializes every table anew, those that are not sharded too, so that tables
        are the same for each strategy; all ranks of the gang have to call then.
    :raises ValueError: a strategy or rule is unknown, a rule matches no table, or a table cannot
        be sharded: it has options or ties that would be lost.
    :raises TypeError: a table is of a class with a ``forward`` of its own, which would be lost.
    """
    rules = dict(rules or {})
    for name, value in [("strategy", strategy), *((f"rules[{k!r}]", v) for k, v in rules.items())]:
        if value not in _STRATEGIES:
            raise ValueError(f"`{name}` must be one of {_STRATEGIES}, but is {value!r} instead.")

    plans = list(_plan(model, strategy, rules))
    return ShardingReport(tuple(_carry_out(plan, gang, init_fn) for plan in plans))


@dataclass(frozen=True)
class _Plan:
    """One Parameter, the modules that use it, and where each of them is registered."""

    weight: Parameter
    tables: dict[Module, list[_Place]]
    heads: dict[nn.Linear, list[_Place]]
    strategy: Literal["embed", "vocab", "none"]


@dataclass(frozen=True)
class _Place:
    parent: Module
    attribute: str
    name: str


def _plan(model: Module, strategy: str, rules: dict[str, Strategy]) -> Iterator[_Plan]:
    places: dict[Module, list[_Place]] = {model: []}
    users: dict[Parameter, list[tuple[Module, str]]] = {}
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(child, []).append(_Place(parent, attribute, name))
        for attribute, parameter in parent._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, []).append((parent, attribute))

    unmatched = set(rules)
    planned: set[Parameter] = set()
    for module, module_places in places.items():
        if not isinstance(module, (nn.Embedding, StandardEmbedding)):
            continue
        names = [place.name for place in module_places] or [""]
        matching = [p for p in rules if any(fnmatchcase(name, p) for name in names)]
        unmatched.difference_update(matching)
        chosen = rules[matching[0]] if matching else strategy
        if chosen == "none":
            weight = cast(Parameter, module.weight)
            if weight not in planned:
                planned.add(weight)
                yield _Plan(weight, {module: module_places}, {}, "none")
            continue
        if not module_places:
            raise ValueError(
                "`model` must contain its tables, but is a table itself. Use "
                "`ShardedEmbedding.from_embedding()` or `VocabShardedEmbedding.from_embedding()`."
            )
        _check_table(module, names[0])
        weight = cast(Parameter, module.weight)
        if weight in planned:
            continue
        planned.add(weight)
        yield _plan_table(weight, users[weight], places, chosen)
    if unmatched:
        raise ValueError(
            f"`rules` must match the name of a table each, but {sorted(unmatched)} match none."
        )


def _check_table(module: nn.Embedding | StandardEmbedding, name: str) -> None:
    skip = f"Leave it out with `rules={{{name!r}: 'none'}}`."
    if "weight" not in module._parameters:
        raise ValueError(
            f"The table '{name}' must hold its `weight` as a Parameter, but computes it (a "
            f"parametrization?) instead. {skip}"
        )
    if isinstance(module, StandardEmbedding):
        return
    if type(module).forward is not nn.Embedding.forward:
        raise TypeError(
            f"The table '{name}' must be a `torch.nn.Embedding`, but is a "
            f"`{type(module).__name__}` with a `forward` of its own instead, which a sharded table "
            f"would not run. {skip}"
        )
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            raise ValueError(
                f"The table '{name}' must not use `{option}`, which sharded tables do not "
                f"have, but it is {getattr(module, option)} instead. {skip}"
            )
    expected = (module.num_embeddings, module.embedding_dim)
    if module.weight.shape != expected:
        raise ValueError(
            f"The table '{name}' must be whole, with a weight of the shape {expected}, but it has "
            f"{tuple(module.weight.shape)} instead. Shard it before another tool slices or "
            "partitions it (AutoTP, `deepspeed.zero.Init`)."
        )


def _plan_table(
    weight: Parameter,
    users: list[tuple[Module, str]],
    places: dict[Module, list[_Place]],
    strategy: str,
) -> _Plan:
    tables: dict[Module, list[_Place]] = {}
    heads: dict[nn.Linear, list[_Place]] = {}
    for user, attribute in users:
        name = places[user][0].name if places[user] else ""
        if isinstance(user, (nn.Embedding, StandardEmbedding)):
            _check_table(user, name)
            tables[user] = places[user]
        elif type(user).forward is nn.Linear.forward and isinstance(user, nn.Linear):
            heads[user] = places[user]
        else:
            raise ValueError(
                f"The weight of the table '{places[next(iter(tables))][0].name}' must be shared "
                f"with embeddings and `torch.nn.Linear` heads only, but '{name}.{attribute}' of a "
                f"`{type(user).__name__}` is the same Parameter, and the tie would break. "
                "Leave the table out with `rules`."
                if tables
                else f"The Parameter '{name}.{attribute}' of a `{type(user).__name__}` is shared "
                "with an embedding table, and the tie would break. Leave the table out with "
                "`rules`."
            )
    if strategy == "auto":
        strategy = "vocab" if heads else "embed"
    return _Plan(weight, tables, heads, "vocab" if strategy == "vocab" else "embed")


def _carry_out(plan: _Plan, gang: Gang, init_fn: InitFn | None) -> TableReport:
    first: StandardEmbedding | _Sharded | None = None
    for module, places in plan.tables.items():
        new = _new_table(_as_standard(module), plan.strategy, gang, init_fn if not first else None)
        if first is None:
            first = new
        elif plan.strategy != "none":
            new.weight = first.weight
        if plan.strategy != "none":
            _put(new, module, places)
    assert first is not None  # A plan is made for a table.
    for linear, places in plan.heads.items():
        assert not isinstance(first, StandardEmbedding)  # Heads are planned for sharded tables.
        _put(TiedHead(first, bias=linear.bias), linear, places)

    names = [p.name for places in plan.tables.values() for p in places] or [""]
    names += [p.name for places in plan.heads.values() for p in places]
    return TableReport(
        names[0],
        first.num_embeddings,
        first.embed_dim,
        plan.strategy,
        tuple(names[1:]),
        bytes_per_rank=first.weight.nbytes,
        bytes_replicated=plan.weight.nbytes,
    )


def _new_table(
    table: StandardEmbedding, strategy: str, gang: Gang, init_fn: InitFn | None
) -> StandardEmbedding | _Sharded:
    if strategy == "none":
        if init_fn is not None:
            table.init_fn = init_fn
            table.reset_parameters()
        return table
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
    """A view of ``module`` as a :class:`StandardEmbedding`, with the same Parameter."""
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


def _put(new: Module, old: Module, places: list[_Place]) -> None:
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new.train(old.training)
    for place in places:
        setattr(place.parent, place.attribute, new)
