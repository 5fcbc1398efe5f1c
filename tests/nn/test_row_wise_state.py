"""Checkpoints, initial values, norms and copies of `RowWiseEmbedding`, by placement."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import tp_embed
from tp_embed import RowWiseEmbedding, StandardEmbedding, VocabShardedEmbedding
from tp_embed.checkpoint import hook_state_dict
from tp_embed.nn import init
from tp_embed.parameter.sharded import local

V, E = 11, 3
PLACEMENTS = "block", "cyclic"


def made(gang, placement, seed=0, **options):
    torch.manual_seed(seed)
    return RowWiseEmbedding(gang, V, E, 4, placement=placement, **options)


def inits(gang, path):
    """Returns the tables of each init function by each placement, and of a whole table."""
    functions = [
        None,
        init.xavier_uniform,
        lambda embed: nn.init.orthogonal_(embed.weight),
        partial(init.from_tensor, source=torch.arange(V * E).view(V, E)),
        partial(init.from_tensor, source=path, key="table"),
    ]
    sizes = 1700, 130  # Some tiles for each rank, and a rest.
    found = []
    for function in functions:
        shape = (V, E) if isinstance(function, partial) else sizes
        tables = []
        for placement in PLACEMENTS:
            torch.manual_seed(3)
            embed = RowWiseEmbedding(gang, *shape, 4, placement=placement, init_fn=function)
            tables.append(embed.to_embedding().weight.detach())
        torch.manual_seed(3)
        tables.append(StandardEmbedding(*shape, 4, init_fn=function).weight.detach())
        found.append([torch.equal(table, tables[-1]) for table in tables])
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_initial_values_depend_on_neither_gang_nor_placement(pool, size, tmp_path):
    path = tmp_path / "table.safetensors"
    save_file({"table": torch.randn(V, E)}, path)
    for found in pool(size, inits, str(path)):
        assert all(map(all, found))


def saved_and_loaded(gang, mode, old, new):
    """Saves a trained table and its moments by one placement, and loads them by another."""
    first, second = made(gang, old), made(gang, new, seed=1)
    optimizers = [torch.optim.Adam(embed.parameters(), lr=0.1) for embed in (first, second)]
    for _ in range(2):
        first(torch.arange(gang.rank, V)).pow(2).sum().backward()
        optimizers[0].step()
    with hook_state_dict(first, mode, optimizer=optimizers[0]):
        state, moments = first.state_dict(), optimizers[0].state_dict()
    with hook_state_dict(second, mode, optimizer=optimizers[1]):
        second.load_state_dict(state)
        optimizers[1].load_state_dict(moments)
    seen = []
    for embed, optimizer in zip((first, second), optimizers, strict=True):
        parts = [local(embed.weight), optimizer.state[embed.weight]["exp_avg_sq"]]
        whole = []
        for part in parts:
            copied = made(gang, embed.placement)
            with torch.no_grad():
                copied.weight.copy_(part)
            whole.append(copied.to_embedding().weight.detach())
        seen.append(whole)
    return [torch.equal(a, b) for a, b in zip(*seen, strict=True)], isinstance(
        state["weight"], DTensor
    )


@pytest.mark.parametrize("mode", ["full", "dtensor"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_checkpoints_load_by_any_placement(pool, size, mode):
    for old in PLACEMENTS:
        for new in PLACEMENTS:
            for same, is_dtensor in pool(size, saved_and_loaded, mode, old, new):
                assert same == [True, True]
                assert is_dtensor == (mode == "dtensor")


def loaded_shard(gang, new):
    state = made(gang, "cyclic").state_dict()
    try:
        made(gang, new).load_state_dict(state)
    except RuntimeError as e:
        return str(e)
    return None


def test_a_shard_of_another_placement_is_refused(pool):
    # Of 11 rows, two ranks hold as many by each placement.
    assert pool(2, loaded_shard, "cyclic") == [None, None]
    for error in pool(2, loaded_shard, "block"):
        assert "must be this rank's shard" in error
        assert "'cyclic': 1" in error


def norms(gang, placement):
    model = nn.ModuleList([made(gang, placement), nn.Linear(E, 2, bias=False)])
    embed, linear = model
    embed(torch.arange(gang.rank + 2)).sum().backward()
    linear.weight.grad = torch.full((2, E), 2.0)
    norm = tp_embed.clip_grad_norm_(model.parameters(), 1.0)
    counts = torch.zeros(V, E)
    for rank in range(gang.size):
        counts[: rank + 2] += 1
    counts[4] = 0  # The pad row.
    expected = torch.cat([counts.flatten(), linear.weight.new_full((2 * E,), 2.0)]).norm()
    torch.testing.assert_close(norm, expected)
    rows = list(embed.rows)
    torch.testing.assert_close(local(embed.weight.grad), counts[rows] / (expected + 1e-6))


@pytest.mark.parametrize("size", [2, 4])
def test_the_norm_counts_each_row_once(pool, size):
    for placement in PLACEMENTS:
        pool(size, norms, placement)


def copies(gang):
    embed = made(gang, "cyclic", grad_reduction="mean", sparse=True)
    for other in (copy.deepcopy(embed), pickle.loads(pickle.dumps(embed))):
        assert repr(other) == repr(embed)
        assert list(other.rows) == list(embed.rows)
        ids = torch.tensor([gang.rank, 10])
        assert torch.equal(other(ids), embed(ids))
        assert torch.equal(other.to_embedding().weight, embed.to_embedding().weight)
    assert f"rows {gang.rank}:11:{gang.size} of 11" in repr(embed.weight)
    whole = made(gang, "block").to_embedding()
    return VocabShardedEmbedding.from_embedding(whole, gang).rows == made(gang, "block").rows


def test_copies(pool):
    assert all(pool(3, copies))


def test_on_meta():
    from tp_embed import FakeGang

    embed = RowWiseEmbedding(FakeGang("cpu", rank=1, size=3), V, E, device="meta")
    output = embed(torch.empty(2, 3, dtype=torch.long, device="meta"))
    assert output.shape == (2, 3, E)
    output.sum().backward()
    assert embed.weight.grad.shape == (4, E)
