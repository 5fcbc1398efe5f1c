"""Chooses what is to become of each table of a model, by a strategy for all and rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, Protocol, cast, get_args, runtime_checkable

from torch import Tensor, nn
from torch.nn import Module

from tp_embed.lookup.options import Output
from tp_embed.lookup.train_rows import Rows, as_rows
from tp_embed.plan.estimate import auto_strategy
from tp_embed.plan.setup import Setup
from tp_embed.surgery.discovery import TableGroup, find_places, find_tables, is_plain_head

Strategy = Literal["auto", "embed", "vocab", "none"]

_STRATEGIES = get_args(Strategy)

Choices = list[tuple[TableGroup, Strategy]]


def choose_strategies(
    model: Module,
    strategy: Strategy,
    rules: Mapping[str, Strategy] | None,
    tie_head: bool,
    shard_head: bool,
    tp_size: int = 1,
    output: Output = "replicated",
) -> Choices:
    """The tables of ``model``, each with what :func:`shard_embeddings` would do with it over a gang
    of ``tp_size`` if embeddings give this ``output``: a strategy but ``"auto"``."""
    rules = dict(rules or {})
    for name, value in [("strategy", strategy), *((f"rules[{k!r}]", v) for k, v in rules.items())]:
        if value not in _STRATEGIES:
            raise ValueError(f"`{name}` must be one of {_STRATEGIES}, but is {value!r} instead.")
    groups = find_tables(model, _untied_heads(model, rules, shard_head))
    _check_patterns("rules", rules, groups)
    found = [(group, _choose(group, strategy, rules, tie_head)) for group in groups]
    return [(g, _auto(g, tp_size, output) if s == "auto" else s) for g, s in found]


def _untied_heads(model: Module, rules: Mapping[str, Strategy], shard_head: bool) -> set[Module]:
    """The heads that are to be sharded although they may be tied to no table."""
    heads: set[Module] = set()
    if shard_head and isinstance(model, SupportsOutputEmbeddings):
        head = model.get_output_embeddings()
        if head is not None and is_plain_head(head):
            heads.add(head)
    for module, places in find_places(model).items():
        named = [place.name for place in places if place.name in rules]
        if isinstance(module, nn.Linear) and named:
            if not is_plain_head(module):
                raise ValueError(
                    f"`rules` must name embeddings, or `torch.nn.Linear` heads with a weight and "
                    f"the `forward` of that class, but '{named[0]}' is a "
                    f"`{type(module).__name__}` that differs in one of these."
                )
            heads.add(module)
    return heads


@runtime_checkable
class SupportsOutputEmbeddings(Protocol):
    """A model of transformers, or one that says as they do which module its output head is."""

    def get_output_embeddings(self) -> Module | None: ...


def _choose(
    group: TableGroup, strategy: Strategy, rules: dict[str, Strategy], tie_head: bool
) -> Strategy:
    for pattern, chosen in rules.items():
        if _matches(pattern, group):
            strategy = chosen
            break
    else:
        if not group.embeddings and strategy != "none":
            return "vocab"
        if group.embeddings and group.heads and not tie_head:
            return "none"
    return strategy


def _auto(group: TableGroup, tp_size: int, output: Output) -> Strategy:
    """What the planner takes, by nothing but sizes and ties, so that all ranks take the same."""
    if not group.embeddings:
        return "vocab"
    if output == "shard" and not group.heads:
        return "embed"  # Which alone gives that.
    sizes = _sizes(group)
    tied = bool(group.heads)
    return auto_strategy(Setup(*sizes, tied=tied, head=tied, tp_size=tp_size))


def _sizes(group: TableGroup) -> tuple[int, int]:
    """V and E, not those of the weight, which DeepSpeed may have put elsewhere."""
    if not group.embeddings:
        head = next(iter(group.heads))
        return head.out_features, head.in_features
    module = cast(nn.Embedding, next(iter(group.embeddings)))
    return module.num_embeddings, module.embedding_dim  # As StandardEmbedding has them too.


def _matches(pattern: str, group: TableGroup) -> bool:
    return any(fnmatchcase(name, pattern) for name in group.names)


def choose_rows(choices: Choices, train_rows: Mapping[str, Rows] | None) -> list[Tensor | None]:
    """For each table the rows that train, if not all do: those of the first pattern that matches.

    :raises TypeError: ``train_rows`` is no mapping, or maps to something else than rows.
    :raises ValueError: a pattern matches no table, or one that is left whole.
    :raises IndexError: a row is not one of the table.
    """
    if train_rows is not None and not isinstance(train_rows, Mapping):
        raise TypeError(
            "`train_rows` must map names of tables to rows, but is a "
            f"`{type(train_rows).__name__}` instead: `train_rows={{'*.embed_tokens': [0, 1]}}`."
        )
    patterns = dict(train_rows or {})
    _check_patterns("train_rows", patterns, [group for group, _ in choices])
    return [_rows_of(group, chosen, patterns) for group, chosen in choices]


def _rows_of(group: TableGroup, chosen: Strategy, patterns: dict[str, Rows]) -> Tensor | None:
    name = group.names[0]
    for pattern, rows in patterns.items():
        if not _matches(pattern, group):
            continue
        if chosen == "none":
            raise ValueError(
                f"The table '{name}' must be sharded to be given `train_rows`, but has the "
                "strategy 'none'. Leave it out, and mask its gradient: "
                "`weight.register_hook(lambda grad: grad * mask)`."
            )
        try:
            return as_rows(rows, _sizes(group)[0])
        except (IndexError, TypeError, ValueError) as e:
            raise type(e)(f"For the table '{name}': {e}") from None
    given = (getattr(module, "train_rows", None) for module in group.embeddings)
    return next((rows for rows in given if rows is not None), None)


def _check_patterns(
    argument: str, patterns: Mapping[str, object], groups: list[TableGroup]
) -> None:
    unmatched = [p for p in patterns if not any(_matches(p, group) for group in groups)]
    if unmatched:
        names = [name for group in groups for name in group.names]
        raise ValueError(
            f"`{argument}` must match the name of a table each, but {unmatched} match none of "
            f"{names}."
        )
