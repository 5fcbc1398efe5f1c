"""Models that are planned for, and the ids that they look up."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tp_embed import shard_embeddings
from tp_embed.nn import loss as sharded_loss
from tp_embed.partition import Partition
from tp_embed.plan import costs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(nn.Module):
    """A table and its head, with nothing between them."""

    def __init__(self, setup):
        super().__init__()
        rows, columns, dtype = setup.vocab_size, setup.embed_dim, DTYPES[setup.dtype]
        device = "meta" if setup.tied else None
        self.embed = nn.Embedding(rows, columns, dtype=dtype)
        self.head = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)
        if setup.tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head


def sharded(gang, setup, strategy, shard_logits, dedup):
    """Returns logits and loss, as models of transformers do."""
    model = Model(setup)
    shard_embeddings(model, gang, strategy=strategy, output=setup.output, check_ids=False)
    if strategy != "none":
        model.embed.dedup = dedup
    if shard_logits:
        model.head.output = "shard"

    def loss(x, target):
        if setup.fuse_loss and strategy != "none":
            return None, model.head.loss(x, target)
        logits = model.head(x)
        if shard_logits:
            found = sharded_loss.cross_entropy(logits, target, gang, model.head.partition)
        else:
            found = cross_entropy(logits.float(), target)
        return logits, found

    return model, loss


def cases(setup):
    return [(found.strategy, found.shard_logits, found.dedup) for found in costs(setup)]


def rows_of_owners(setup, count):
    """Returns ``count`` distinct rows of the table, spread evenly over the ranks, or with the share
    of the first one that the setup gives."""
    partition = Partition(setup.vocab_size, setup.tp_size)
    left = [list(partition.shard(rank)) for rank in range(setup.tp_size)]
    found = []
    if setup.owner_share is not None:
        found = [left[0].pop(0) for _ in range(math.ceil(setup.owner_share * count))]
        left = left[1:]
    while len(found) < count:
        found += [rows.pop(0) for rows in reversed(left) if rows]
    return found[:count]


def ids_of(setup, lengths=None):
    """Ids in blocks of these lengths, or in one: each repeats so many as are planned for it."""
    ids = []
    for length in lengths or [setup.tokens]:
        share = setup.block_unique_share if lengths else setup.unique_share
        rows = rows_of_owners(setup, min(math.ceil(share * length), setup.vocab_size))
        ids += [rows[i % len(rows)] for i in range(length)]
    return torch.tensor(ids)
