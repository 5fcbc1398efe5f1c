"""Chooses the strategy of each table of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import Module

from tp_embed.lookup.options import Output
from tp_embed.lookup.train_rows import Rows, as_rows
from tp_embed.partition import auto_strategy
from tp_embed.surgery.discovery import TableGroup, find_places, find_tables, is_plain_head
from tp_embed.surgery.options import ShardingOptions, Strategy

_STRATEGIES = get_args(Strategy)

Choices = list[tuple[TableGroup, Strategy]]


def tables_to_choose_for(model: Module, options: ShardingOptions) -> list[TableGroup]:
    """Finds the tables of the embeddings of ``model``, and of output heads that ``options`` shard
    even if untied.

    :raises ValueError: a strategy is unknown, or a rule names a head that is not plainly linear.
    """
    rules = ((f"rules[{pattern!r}]", value) for pattern, value in options.rules.items())
    for name, value in [("strategy", options.strategy), *rules]:
        if value not in _STRATEGIES:
            raise ValueError(f"`{name}` must be one of {_STRATEGIES}, but is {value!r} instead.")
    return find_tables(model, _untied_heads(model, options.rules, options.shard_head))


def choose_strategies(
    tables: list[TableGroup], options: ShardingOptions, tp_size: int, left: Collection[str] = ()
) -> Choices:
    """Chooses a strategy for each table over a gang of ``tp_size``; never ``"auto"``.

    :param left: the names of tables that stay whole, unless a rule names them.
    :raises ValueError: a rule matches no table.
    """
    _check_patterns("rules", options.rules, tables)
    found = [(table, _choose(table, options, left)) for table in tables]
    return [(t, _auto(t, tp_size, options.output) if s == "auto" else s) for t, s in found]


def _untied_heads(model: Module, rules: Mapping[str, Strategy], shard_head: bool) -> set[Module]:
    """Returns the heads to shard even if they are untied."""
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
                    f"`rules` must name embeddings, or heads with the weight and the `forward` of "
                    f"`torch.nn.Linear`, but '{named[0]}' is a `{type(module).__name__}` that "
                    "changes one of these."
                )
            heads.add(module)
    return heads


@runtime_checkable
class SupportsOutputEmbeddings(Protocol):
    """A model that names its output head as models of transformers do."""

    def get_output_embeddings(self) -> Module | None: ...


def _choose(group: TableGroup, options: ShardingOptions, left: Collection[str]) -> Strategy:
    for pattern, chosen in options.rules.items():
        if _matches(pattern, group):
            return chosen
    if any(name in left for name in group.names):
        return "none"
    if not group.embeddings and options.strategy != "none":
        return "vocab"
    if group.embeddings and group.heads and not options.tie_head:
        return "none"
    return options.strategy


def _auto(group: TableGroup, tp_size: int, output: Output) -> Strategy:
    """Chooses by sizes and ties only, so that all ranks choose the same."""
    if not group.embeddings:
        return "vocab"
    if output == "shard" and not group.heads:
        return "embed"  # No other strategy supports it.
    return auto_strategy(*_sizes(group), tp_size, tied=bool(group.heads))


def _sizes(group: TableGroup) -> tuple[int, int]:
    """Returns V and E. The weight may not have them: DeepSpeed may have partitioned it."""
    if not group.embeddings:
        head = next(iter(group.heads))
        return head.out_features, head.in_features
    module = cast(nn.Embedding, next(iter(group.embeddings)))
    return module.num_embeddings, module.embedding_dim  # StandardEmbedding has the same names.


def _matches(pattern: str, group: TableGroup) -> bool:
    return any(fnmatchcase(name, pattern) for name in group.names)


def choose_rows(choices: Choices, train_rows: Mapping[str, Rows] | None) -> list[Tensor | None]:
    """Returns the rows that train for each table, from the first pattern that matches; ``None`` if
    all train.

    :raises TypeError: ``train_rows`` is no mapping, or its values are not rows.
    :raises ValueError: a pattern matches no table, or one that stays whole.
    :raises IndexError: a row is not in the table.
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
    given = (getattr(module, "train_rows", None) for module in group.embeddings)
    own = next((rows for rows in given if rows is not None), None)
    for pattern, rows in patterns.items():
        if not _matches(pattern, group):
            continue
        if chosen == "none":
            raise ValueError(
                f"The table '{name}' must be sharded to use `train_rows`, but has the strategy "
                "'none'. Leave it out, and mask its gradient: "
                "`weight.register_hook(lambda grad: grad * mask)`."
            )
        try:
            found = as_rows(rows, _sizes(group)[0])
        except (IndexError, TypeError, ValueError) as e:
            raise type(e)(f"For the table '{name}': {e}") from None
        if own is not None and not torch.equal(own, found):
            raise ValueError(
                f"`train_rows` must be the same as the table '{name}' has already, but has "
                f"{len(found)} rows where the table has {len(own)}. Leave the table out of "
                "`train_rows`."
            )
        return found
    return own


def _check_patterns(
    argument: str, patterns: Mapping[str, object], groups: list[TableGroup]
) -> None:
    unmatched = [p for p in patterns if not any(_matches(p, group) for group in groups)]
    if unmatched:
        names = [name for group in groups for name in group.names]
        raise ValueError(
            f"`{argument}` must match names of tables, but {unmatched} match none of {names}."
        )
