"""The rows that a step updates, as a monitor counts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tp_embed import RowWiseEmbedding, ShardedEmbedding, StandardEmbedding, VocabShardedEmbedding
from tp_embed.monitor import Monitor, write_report
from tp_embed.optim import RowwiseAdagrad

V, E, STEPS = 29, 6, 3
KINDS = {
    "embed": ShardedEmbedding,
    "vocab": VocabShardedEmbedding,
    "world": RowWiseEmbedding,
    "standard": StandardEmbedding,
    "torch": nn.Embedding,
}


def batches(rank):
    return torch.randint(V, (STEPS, 11), generator=torch.Generator().manual_seed(rank))


def updated(gang, name, sparse, size):
    gangs = [gang.create_gang(range(i, i + size)) for i in range(0, gang.size, size)]
    (shared,) = (made for made in gangs if made is not None)
    sizes = (V, E) if name in ("standard", "torch") else (shared, V, E)
    table = KINDS[name](*sizes, sparse=sparse)
    model = nn.Sequential(table)
    params = [table.weight]
    optimizer = RowwiseAdagrad(params) if sparse else torch.optim.SGD(params)
    monitor = Monitor(model, optimizer, every=1)
    for ids in batches(shared.rank if name == "world" else 0):
        model(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    return [(row["updated_rows"], row["unique_ratio"]["0"]) for row in monitor.rows]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_counts_each_row_of_the_table_once(pool, name, size):
    found, *others = pool(4, updated, name, True, size)  # A monitor needs all ranks of the job.
    ranks = size if name == "world" else 1
    ids = torch.stack([batches(rank) for rank in range(ranks)], dim=1)
    assert [rows for rows, _ in found] == [{"0": len(step.unique())} for step in ids]
    ratios = [sum(len(row.unique()) for row in step) / step.numel() for step in ids]
    assert [ratio for _, ratio in found] == pytest.approx(ratios)
    assert others == [[]] * 3


def test_a_dense_gradient_updates_all_rows(pool):
    assert [rows for rows, _ in pool(4, updated, "vocab", False, 2)[0]] == [{}] * STEPS


@pytest.mark.parametrize("sparse", [True, False])
def test_a_page_draws_them(tmp_path, sparse):
    table = nn.Embedding(V, E, sparse=sparse)
    model, optimizer = nn.Sequential(table), torch.optim.SGD([table.weight], lr=0.1)
    monitor = Monitor(model, optimizer, every=1, directory=tmp_path)
    for ids in batches(0):
        model(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    assert ("Rows that a step updates" in write_report(tmp_path).read_text()) == sparse
