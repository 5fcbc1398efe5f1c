"""Makes the sharded modules of one table, and replaces the old ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from tp_embed.gang import Gang
from tp_embed.nn.embedding import (
    RowWiseEmbedding,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.nn.head import OutputHead
from tp_embed.surgery.carry import LostInit, carry_module, carry_parameter, retire
from tp_embed.surgery.discovery import Place, TableGroup, output_scale
from tp_embed.surgery.optimizer import Shard
from tp_embed.surgery.options import ShardingOptions, Strategy
from tp_embed.surgery.report import TableReport

_Sharded = ShardedEmbedding | VocabShardedEmbedding | RowWiseEmbedding
_KINDS: dict[str, Any] = {
    "embed": ShardedEmbedding,
    "vocab": VocabShardedEmbedding,
    "world": RowWiseEmbedding,
}


@dataclass(frozen=True)
class TableChange:
    """The change to one table: new ``modules`` replace old ones, with a ``shard`` as the weight; or
    the table gets new ``values``; or it stays as it is."""

    group: TableGroup
    strategy: Strategy
    shape: tuple[int, ...]
    shard: Shard | None = None
    modules: tuple[tuple[Module, Module, list[Place]], ...] = ()
    values: Tensor | None = None

    def apply(self, gang: Gang) -> TableReport:
        for old, new, places in self.modules:
            carry_module(old, new)
            for place in places:
                setattr(place.parent, place.attribute, new)
            retire(old, new, places[0].name)
        name, weight = self.group.names[0], self.group.weight
        if self.shard is not None:
            carry_parameter(weight, self.shard, 1 if self.strategy == "embed" else 0, name)
        if self.values is not None:
            with torch.no_grad(), gang.whole(weight, modified=True):
                weight.copy_(self.values)
        bytes_replicated = math.prod(self.shape) * weight.element_size()
        num_rows, dim = self.shape
        return TableReport(
            name,
            num_rows,
            dim,
            self.strategy,
            tied=tuple(self.group.shared_with),
            bytes_per_rank=self.shard.parameter.nbytes if self.shard else bytes_replicated,
            bytes_replicated=bytes_replicated,
        )


def make_change(
    group: TableGroup,
    strategy: Strategy,
    gang: Gang,
    options: ShardingOptions,
    train_rows: Tensor | None,
) -> TableChange:
    """Makes the modules that replace a table, while its weight is whole. Doesn't change the model.
    Communicates only if ``options.init_fn`` does."""
    shape = tuple(group.weight.shape)
    if strategy == "none":
        return TableChange(group, strategy, shape, values=_draw(group, gang, options))
    first: _Sharded | None = None
    modules: list[tuple[Module, Module, list[Place]]] = []
    for embedding, places in group.embeddings.items():
        table = as_standard(embedding, shape, options, train_rows)
        new = _shard(table, strategy, gang, options, draw=first is None)
        if first is None:
            first = new
        else:
            new.weight = first.weight
        modules.append((embedding, new, places))
    if first is None:  # An untied head.
        table = as_standard(next(iter(group.heads)), shape, ShardingOptions(), train_rows)
        first = _shard(table, strategy, gang, ShardingOptions())
    for head, places in group.heads.items():
        assert not isinstance(first, RowWiseEmbedding)  # The plan has checked it.
        new_head = OutputHead(
            first,
            bias=head.bias,
            input=options.head_input,
            deterministic=options.head_deterministic,
        )
        modules.append((head, new_head, places))
    shard = Shard(first.weight, first.rows, first.columns)
    return TableChange(group, strategy, shape, shard, tuple(modules))


def _draw(group: TableGroup, gang: Gang, options: ShardingOptions) -> Tensor | None:
    """Draws new values for a table that stays whole, over the gang so that its ranks agree."""
    if options.init_fn is None or not group.embeddings:
        return None
    drawn = ShardingOptions(init_fn=options.init_fn)
    table = as_standard(next(iter(group.embeddings)), tuple(group.weight.shape), drawn)
    return _shard(table, "embed", gang, drawn).to_embedding().weight.detach()


def _shard(
    table: StandardEmbedding,
    strategy: Strategy,
    gang: Gang,
    options: ShardingOptions,
    draw: bool = True,
) -> _Sharded:
    kind = _KINDS[strategy]
    names = ("placement", "grad_reduction") if strategy == "world" else ("output", "check_ids")
    lookup = {name: getattr(options, name) for name in ("dedup", *names)}
    new: _Sharded
    if options.init_fn is None or not draw:
        new = kind.from_embedding(table, gang, **lookup)
        return new
    new = kind(
        gang,
        table.num_embeddings,
        table.embed_dim,
        table.pad_idx,
        init_fn=options.init_fn,
        device=table.weight.device,
        dtype=table.weight.dtype,
        **table.options.of_whole(),
        **lookup,
    )
    new.weight.requires_grad_(table.weight.requires_grad)
    return new


def as_standard(
    module: Module,
    shape: tuple[int, ...],
    options: ShardingOptions,
    train_rows: Tensor | None = None,
) -> StandardEmbedding:
    """Wraps the Parameter of ``module`` in a :class:`StandardEmbedding` with these options."""
    pad_idx, init_fn, sparse, reuse_grad, scale = None, None, False, False, None
    if isinstance(module, StandardEmbedding):
        pad_idx, init_fn, scale = module.pad_idx, module.init_fn, module.scale
        sparse, reuse_grad = module.sparse, module.reuse_grad
    elif isinstance(module, nn.Embedding):
        pad_idx, sparse, scale = module.padding_idx, module.sparse, output_scale(module)
        if type(module).reset_parameters is not nn.Embedding.reset_parameters:
            init_fn = LostInit(type(module).__name__)
    weight = cast(Parameter, module.weight)
    num_rows, dim = shape
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
    )
    standard.weight = weight
    standard.train_rows = train_rows  # The constructor would register a mask on the model's weight.
    return standard.train(module.training)
