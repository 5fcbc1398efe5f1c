"""The pad row after a user's init function: kept for a pretrained table, as in
``nn.Embedding.from_pretrained()``, and zero for a random one, as in ``nn.Embedding``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tp_embed import ShardedEmbedding, StandardEmbedding, VocabShardedEmbedding, shard_embeddings

KINDS = {"embed": ShardedEmbedding, "vocab": VocabShardedEmbedding}

PRETRAINED = torch.arange(1.0, 11 * 6 + 1).view(11, 6)


def copies(embed):
    with torch.no_grad():
        embed.weight.copy_(PRETRAINED)


def copies_data(embed):
    embed.weight.data[:] = PRETRAINED


def loads(embed):
    embed.load_state_dict({"weight": PRETRAINED})


def copies_other_rows(embed):
    """Fills all rows but the pad row, 3, which would otherwise be uninitialized."""
    with torch.no_grad():
        embed.weight[:3] = PRETRAINED[:3]
        embed.weight[4:] = PRETRAINED[4:]


def draws(embed):
    nn.init.xavier_uniform_(embed.weight)


def draws_from_its_own_generator(embed):
    embed.weight.data.normal_(generator=torch.Generator().manual_seed(3))


def draws_elsewhere(embed):
    embed.weight.data.copy_(torch.rand(11, 6) + 1)


def grows(embed):
    """Draws new rows next to pretrained ones: torch drew numbers, so the pad row is zero."""
    nn.init.normal_(embed.weight)
    embed.weight.data[:8] = PRETRAINED[:8]


KEPT = [copies, copies_data, loads]
ZERO = [copies_other_rows, draws, draws_from_its_own_generator, draws_elsewhere, grows]


def tables(gang, kind, init_fn, dtype):
    embed = KINDS[kind](gang, 11, 6, pad_idx=3, init_fn=init_fn, dtype=dtype)
    found = [embed.to_embedding().weight.detach()]
    embed.reset_parameters()
    found.append(embed.to_embedding().weight.detach())
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=3, dtype=dtype))
    shard_embeddings(model, gang, strategy=kind, init_fn=init_fn)
    found.append(model[0].to_embedding().weight.detach())
    return [(table.any(1).tolist(), table[3].tolist()) for table in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init_fn", [*KEPT, *ZERO])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pad_row(pool, size, kind, init_fn, dtype):
    pad_row = PRETRAINED[3].tolist() if init_fn in KEPT else [0.0] * 6
    nonzero = [row != 3 or init_fn in KEPT for row in range(11)]
    for found in pool(size, tables, kind, init_fn, dtype):
        assert found == [(nonzero, pad_row)] * 3
    whole = StandardEmbedding(11, 6, pad_idx=-8, init_fn=init_fn, dtype=dtype).weight
    assert whole[3].tolist() == pad_row
