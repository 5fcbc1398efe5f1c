"""`shard_embeddings()` with the strategy "world": tables over all ranks, each with its own ids."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from tp_embed import FakeGang, GangError, RowWiseEmbedding, ShardedEmbedding, shard_embeddings
from tp_embed.nn import init
from tp_embed.parameter.sharded import local

V, BUCKETS, E = 10, 15, 4


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.ngram_table = nn.Embedding(V, E), nn.Embedding(BUCKETS, E, padding_idx=3)
        self.head = nn.Linear(E, V)

    def forward(self, ids):
        return self.head(self.embed(ids) + self.ngram_table(ids * 7 % BUCKETS)).logsumexp(-1).mean()


def batch(dp_rank):
    return torch.randint(V, (6,), generator=torch.Generator().manual_seed(dp_rank))


def in_pairs(gang):
    pairs = [gang.create_gang([0, 1]), gang.create_gang([2, 3])]
    return next(filter(None, pairs))


RULES = {"*ngram*": "world"}


def trained(gang, placement, options):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.arange(V)).backward()
    optimizer.step()  # Its states are cut.
    optimizer.zero_grad()
    chosen = {"placement": placement, "grad_reduction": "mean", "optimizer": optimizer, **options}
    report = shard_embeddings(model, in_pairs(gang), rules=RULES, **chosen)
    assert isinstance(model.embed, ShardedEmbedding)
    table = model.ngram_table
    assert isinstance(table, RowWiseEmbedding)
    assert (table.gang.size, table.placement, table.pad_idx) == (4, placement, 3)
    assert [entry.strategy for entry in report.tables] == ["embed", "world"]
    model(batch(gang.rank // 2)).backward()
    grad = local(table.weight.grad).clone()
    optimizer.step()
    return grad, list(table.rows), table.to_embedding().weight.detach()


@pytest.mark.parametrize("placement", ["block", "cyclic"])
def test_trains_as_one_process(pool, placement):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.arange(V)).backward()
    optimizer.step()
    optimizer.zero_grad()
    (sum(model(batch(rank)) for rank in range(2)) / 2).backward()
    grad = model.ngram_table.weight.grad.clone()
    optimizer.step()
    for found, rows, table in pool(4, trained, placement, {}):
        torch.testing.assert_close(found, grad[rows], atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(table, model.ngram_table.weight.detach(), atol=1e-5, rtol=0)


def drawn(gang):
    model = Model()
    torch.manual_seed(5)
    shard_embeddings(model, in_pairs(gang), rules=RULES, init_fn=init.uniform)
    again = Model()
    torch.manual_seed(5)
    shard_embeddings(again, FakeGang("cpu"), strategy="none", init_fn=init.uniform)
    return torch.equal(model.ngram_table.to_embedding().weight, again.ngram_table.weight)


def test_draws_the_same_table_as_one_rank(pool):
    assert all(pool(4, drawn))


def cut_out_of_other_tables(gang):
    model = Model(seed=gang.rank // 2)  # Tensor-parallel ranks agree.
    shard_embeddings(model, in_pairs(gang))
    model = Model(seed=gang.rank // 2)
    with pytest.raises(GangError, match=r"agree on the values of 'ngram_table' \(a checksum\)"):
        shard_embeddings(model, in_pairs(gang), rules=RULES)
    assert isinstance(model.ngram_table, nn.Embedding)
    # One gang can't shard its model, so the other one doesn't either.
    model = Model()
    if gang.rank < 2:
        model.ngram_table.max_norm = 1.0
    with suppress(ValueError), pytest.raises(GangError, match="must not use `max_norm`"):
        shard_embeddings(model, in_pairs(gang), rules=RULES)
    assert isinstance(model.ngram_table, nn.Embedding)


def test_all_ranks_compare_the_table(pool):
    pool(4, cut_out_of_other_tables)


def test_refusals():
    model = Model()
    with pytest.raises(ValueError, match="`output` must be 'replicated' for the strategy 'world'"):
        shard_embeddings(model, FakeGang("cpu"), rules=RULES, output="sequence")
    model.head.weight = model.embed.weight
    with pytest.raises(ValueError, match="must not be shared with an output head for the strategy"):
        shard_embeddings(model, FakeGang("cpu"), rules={"embed": "world"})


def test_one_process():
    model, expected = Model(), Model()
    shard_embeddings(model, FakeGang("cpu"), strategy="world", placement="cyclic")
    assert isinstance(model.embed, RowWiseEmbedding)
    assert torch.equal(model(batch(0)), expected(batch(0)))
