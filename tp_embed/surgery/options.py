"""The options of a surgery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tp_embed.lookup.exchange import Dedup
from tp_embed.lookup.options import GradReduction, Output
from tp_embed.lookup.same_ids import check_interval
from tp_embed.lookup.train_rows import Rows
from tp_embed.nn.embedding import InitFn, Placement
from tp_embed.nn.head import Input
from tp_embed.nn.tiled_values import Deterministic

Strategy = Literal["auto", "embed", "vocab", "world", "none"]


@dataclass(frozen=True)
class ShardingOptions:
    """Options of :func:`tp_embed.shard_embeddings`, documented there."""

    strategy: Strategy = "auto"
    rules: Mapping[str, Strategy] = field(default_factory=dict)
    tie_head: bool = True
    shard_head: bool = True
    output: Output = "replicated"
    head_input: Input = "replicated"
    head_deterministic: Deterministic = None
    dedup: Dedup = "auto"
    sparse: bool | None = None
    reuse_grad: bool | None = None
    check_ids: int | None = None
    init_fn: InitFn | None = None
    train_rows: Mapping[str, Rows] | None = None
    placement: Placement = "block"
    grad_reduction: GradReduction = "sum"

    @property
    def uses_world(self) -> bool:
        """Whether a table may have the strategy ``"world"``."""
        return "world" in (self.strategy, *self.rules.values())

    def facts(self) -> dict[str, object]:
        """Returns the options that must be the same on every rank of the gang."""
        names = "output head_input head_deterministic dedup sparse reuse_grad placement"
        return {
            **{f"`{name}`": getattr(self, name) for name in f"{names} grad_reduction".split()},
            "`check_ids`": check_interval(self.check_ids),
            "whether there is an `init_fn`": self.init_fn is not None,
        }
