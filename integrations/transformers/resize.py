"""`resize_token_embeddings()` of models with sharded tables."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.multivariate_normal import MultivariateNormal
from torch.nn import Module, Parameter

from tp_embed.gang.collectives import all_gather_columns
from tp_embed.gang.redistribute import redistribute
from tp_embed.nn.head import OutputHead, ShardedLayer
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition, as_slice, within

from .layers import sharded_layers, table_shape

# The size of the part of a table to gather at a time.
_CHUNK_BYTES = 16 << 20

# The factor of the old rows' covariance in transformers.
_EPSILON = 1e-9


class ResizesShards:
    """A mixin for models of transformers; goes before their class."""

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Resizes shards as transformers resizes tables. All ranks must call it. Keeps old rows bit
        for bit. With a table sharded over the vocabulary, moves rows to their new ranks. A rank
        holds its old and new shard, the new rows, and 16 MiB; ``mean_resizing`` takes some E x E
        fp32 items on top. Rank 0 of the gang draws new rows from the same distribution as
        transformers. Replaces the Parameters: resize before you build an optimizer.

        :raises ValueError: the model already has a DeepSpeed engine.
        """
        table = self.get_input_embeddings()
        if not isinstance(table, ShardedLayer):
            return super().resize_token_embeddings(  # type: ignore[misc]
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise ValueError(
                    f"`pad_to_multiple_of` must be a positive integer, but is {pad_to_multiple_of}."
                )
            size = table_shape(table)[0] if new_num_tokens is None else new_num_tokens
            new_num_tokens = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if new_num_tokens is None:
            return table
        if new_num_tokens < 1:
            raise ValueError(
                f"`new_num_tokens` must be greater than or equal to 1, but is {new_num_tokens}."
            )
        _check_no_engine(self)
        if any(layer.train_rows is not None for _, layer in sharded_layers(self)):
            raise ValueError(
                "The tables must have no `train_rows` when the vocabulary is resized, since these "
                "are rows of the old one, but have some. Resize the model first, then call "
                "`shard_embeddings()` with `train_rows`."
            )
        super().resize_token_embeddings(new_num_tokens, None, mean_resizing)  # type: ignore[misc]
        # The base class has read the size of a shard.
        self.config.get_text_config().vocab_size = self.vocab_size = new_num_tokens
        return table

    def _get_resized_embeddings(
        self: Any,
        old_embeddings: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        return self._resized(
            super()._get_resized_embeddings,  # type: ignore[misc]
            (old_embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing),
        )

    def _get_resized_lm_head(
        self: Any,
        old_lm_head: Any,
        new_num_tokens: int | None = None,
        transposed: bool = False,
        mean_resizing: bool = True,
    ) -> Any:
        return self._resized(
            super()._get_resized_lm_head,  # type: ignore[misc]
            (old_lm_head, new_num_tokens, transposed, mean_resizing),
        )

    def _resized(self: Any, of_transformers: Any, args: tuple[Any, ...]) -> Any:
        layer, num_rows, _, mean_resizing = args
        if not isinstance(layer, ShardedLayer):
            return of_transformers(*args)
        if num_rows is not None and num_rows != table_shape(layer)[0]:
            resize_table(self, layer, num_rows, mean_resizing)
        return layer

    def _adjust_bias(self: Any, output_embeddings: Any, input_embeddings: Any) -> None:
        """Pads a head's bias to the rows of its table. The bias of our heads already fits."""
        if not isinstance(output_embeddings, OutputHead):
            super()._adjust_bias(output_embeddings, input_embeddings)  # type: ignore[misc]


@torch.no_grad()
def resize_table(model: Any, layer: ShardedLayer, num_rows: int, mean_resizing: bool) -> None:
    """Resizes the table of ``layer``, and all layers of ``model`` tied to it, to ``num_rows``."""
    old_weight, old_size = layer.weight, table_shape(layer)[0]
    new = _new_rows(model, layer, max(0, num_rows - old_size), mean_resizing)
    weight = Parameter(_resize_block(layer, num_rows, new), old_weight.requires_grad)
    tied = [other for _, other in sharded_layers(model) if other.weight is old_weight]
    for other in dict.fromkeys(tied):
        if isinstance(other, OutputHead):
            other.out_features = num_rows
            if other.shard_dim == 0:
                other.partition = Partition(num_rows, other.gang.size)
            if other.bias is not None:
                _resize_bias(other, other.bias, num_rows)
        else:
            other.num_embeddings = num_rows
            if other.pad_idx is not None and other.pad_idx >= num_rows:
                other.pad_idx = None
        other.weight = weight
        other.gang.adopt(other)


def _resize_block(layer: ShardedLayer, num_rows: int, new: Tensor) -> Tensor:
    """Returns this rank's block of the table with ``num_rows`` rows; the last are ``new``."""
    gang, old, block = layer.gang, layer.partition, local(layer.weight)
    if layer.shard_dim == 1:
        own = old.shard(gang.rank)
        return torch.cat([block[:num_rows], new[:, own.start : own.stop]])
    partition = replace(old, size=num_rows)
    own = partition.shard(gang.rank)
    drawn = own[within(own, old.size, num_rows)]
    moved = redistribute(block, old, partition, gang)
    return torch.cat([moved, new[as_slice(drawn, old.size)]])


def _new_rows(model: Any, layer: ShardedLayer, count: int, mean_resizing: bool) -> Tensor:
    """Draws new rows, the same on every rank of the gang. *Shape:* :math:`(count,E)`."""
    weight, gang, dim = layer.weight, layer.gang, table_shape(layer)[1]
    if not count or weight.is_meta:
        return weight.new_empty((count, dim))
    factory: Any = {"device": weight.device, "dtype": weight.dtype}
    # Every rank draws, so that equal generators stay equal.
    if mean_resizing:
        rows = _like_the_old(layer, count).to(**factory)
    elif isinstance(layer, OutputHead):
        head = nn.Linear(dim, count, bias=False, **factory)
        model._init_weights(head)
        rows = head.weight.detach()
    else:
        table = nn.Embedding(count, dim, **factory)
        model._init_weights(table)
        rows = table.weight.detach()
    rows = rows.to(gang.device).contiguous()
    if gang.size > 1:
        gang.broadcast(rows)
    return rows.to(weight.device)


def _like_the_old(layer: ShardedLayer, count: int) -> Tensor:
    """Draws rows around the mean of the old rows, with a small part of their covariance: Hewitt,
    "Initializing new word embeddings for pretrained language models" (2021)."""
    mean, covariance = _moments(layer)
    if constraints.positive_definite.check(_EPSILON * covariance).all():
        return MultivariateNormal(mean, covariance_matrix=_EPSILON * covariance).sample((count,))
    return mean.repeat(count, 1)


def _moments(layer: ShardedLayer) -> tuple[Tensor, Tensor]:
    """Returns the mean and covariance of the rows, in fp32. *Shapes:* :math:`(E)`,
    :math:`(E,E)`."""
    block, gang = local(layer.weight), layer.gang
    size, dim = table_shape(layer)
    by_rows = layer.shard_dim == 0
    step = max(1, _CHUNK_BYTES // (4 * dim))

    total = torch.zeros(block.shape[1], device=gang.device)
    for rows in block.split(step):
        total += rows.to(gang.device, torch.float32).sum(0)
    if by_rows and gang.size > 1:
        gang.all_reduce(total)
    mean = total / size
    if not by_rows:
        mean = all_gather_columns(mean, gang, layer.partition)

    covariance = torch.zeros(dim, dim, device=gang.device)
    for rows in block.split(step):
        rows = rows.to(gang.device, torch.float32)
        centered = (rows if by_rows else all_gather_columns(rows, gang, layer.partition)) - mean
        covariance += centered.T @ centered
    if by_rows and gang.size > 1:
        gang.all_reduce(covariance)
    return mean, covariance / size


def _resize_bias(head: OutputHead, bias: Parameter, num_rows: int) -> None:
    """Gives new items the mean of the old ones: transformers adds less than fp32 resolves."""
    added = max(0, num_rows - len(bias))
    items = bias.detach().float().mean().to(bias.dtype).repeat(added)
    head.bias = Parameter(torch.cat([bias.detach()[:num_rows], items]), bias.requires_grad)


def _check_no_engine(model: Module) -> None:
    has_engine = False
    if "deepspeed" in sys.modules:
        from tp_embed.integrations.deepspeed.private import is_of_engine

        has_engine = getattr(model, "ds_autotp_parsed", False) or any(
            map(is_of_engine, model.parameters())
        )
    if has_engine:
        raise ValueError(
            "The vocabulary must be resized before `deepspeed.initialize()`, but an engine holds "
            "the Parameters already. Save a checkpoint, give it more rows with "
            "`tp_embed.integrations.deepspeed.to_universal()` and `resize_vocab()`, and load it "
            "with `load_universal()` into an engine of a model that has been resized."
        )
