"""Loading DTensors over any mesh gives the right rows, or the same error on all ranks."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard

from tp_embed import FakeGang, shard_embeddings
from tp_embed.checkpoint import hook_state_dict

# Blocks over another mesh have the same shapes as over the gang, on some ranks or on all.
SIZES = [(8, 4), (3, 4), (4, 3), (1, 2), (2, 1)]


def table_of(rows, width):
    return torch.arange(1.0, rows * width + 1).view(rows, width)


class Tied(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.embed.weight


def load(gang, strategy, value, expected):
    """Loads into an embedding and a tied head."""
    rows, width = expected.shape
    model = Tied(rows, width)
    shard_embeddings(model, gang, strategy=strategy)
    before = model.embed.weight.detach().clone()
    with hook_state_dict(model):
        try:
            model.load_state_dict({"embed.weight": value, "head.weight": value})
        except RuntimeError as e:
            assert torch.equal(model.embed.weight.detach(), before)
            return str(e)
    r, c = model.embed.rows, model.embed.columns
    own = expected[r.start : r.stop, c.start : c.stop]
    assert torch.equal(model.embed.weight.detach(), own)
    return None


def last(gang, size):
    """Returns the gang of the last ``size`` ranks of the job, or ``None``, and their ranks. All
    processes must make a mesh, even those outside."""
    ranks = list(range(gang.size - size, gang.size))
    return gang.create_gang(ranks), ranks


def over_own_ranks(gang, strategy, size):
    """All ranks of the mesh are in the gang, so any cut can be gathered."""
    gang, ranks = last(gang, size)
    flat = DeviceMesh("cpu", ranks)
    square = DeviceMesh("cpu", torch.tensor(ranks).view(1, -1), mesh_dim_names=("one", "all"))
    if gang is None:
        return
    cuts = [(flat, [cut]) for cut in (Shard(0), Shard(1), Replicate())]
    cuts += [(square, [a, b]) for a in (Replicate(), Shard(0)) for b in (Shard(0), Shard(1))]
    cuts += [(square["all"], [Shard(0)])]
    cuts += [(square, [_StridedShard(0, split_factor=gang.size), Shard(0)])]
    for rows, width in SIZES:
        expected = table_of(rows, width)
        for mesh, placements in cuts:
            strided = any(isinstance(cut, _StridedShard) for cut in placements)
            if strided and rows % gang.size:  # torch has no such meshes.
                continue
            value = distribute_tensor(expected.clone(), mesh, placements)
            assert load(gang, strategy, value, expected) is None, (mesh, placements)
        part = expected * (1 + gang.rank)
        total = expected * sum(range(1, gang.size + 1))
        assert load(gang, strategy, DTensor.from_local(part, flat, [Partial()]), total) is None


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_mesh_over_the_ranks_of_the_gang(pool, size, strategy):
    pool(4, over_own_ranks, strategy, size)


def gangs_of(gang, size):
    """Returns the gang of this rank, of ``size`` neighbours."""
    blocks = [range(i, i + size) for i in range(0, gang.size, size)]
    short = timedelta(seconds=10)
    return next(g for g in [gang.create_gang(b, timeout=short) for b in blocks] if g)


def over_other_ranks(gang, strategy, size):
    """Meshes that include other gangs, or miss ranks of the gang."""
    own = gangs_of(gang, size)
    world = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    flat = DeviceMesh("cpu", torch.arange(4))
    cuts = [(world["dp"], [cut]) for cut in (Shard(0), Shard(1))]
    cuts += [(flat, [cut]) for cut in (Shard(0), Shard(1))]
    cuts += [(world, [a, b]) for a in (Replicate(), Shard(0)) for b in (Shard(0), Shard(1))]
    whole = [(world["dp"], [Replicate()]), (flat, [Replicate()]), (world, [Replicate()] * 2)]
    for rows, width in SIZES:
        expected = table_of(rows, width)
        for mesh, placements in cuts:
            value = distribute_tensor(expected.clone(), mesh, placements)
            message = load(own, strategy, value, expected)
            if set(mesh.mesh.flatten().tolist()) <= set(own.global_ranks):
                assert message is None
                continue
            assert "`embed.weight` must be a DTensor over ranks of its gang" in message
            assert "`full_tensor()`" in message
        for mesh, placements in whole:
            value = distribute_tensor(expected.clone(), mesh, placements)
            assert load(own, strategy, value, expected) is None


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2])
def test_mesh_over_ranks_of_other_gangs(pool, size, strategy):
    pool(4, over_other_ranks, strategy, size)


def over_parts(gang, strategy):
    """Each half of the gang has the whole table."""
    world = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    for mesh in (world["tp"], world["dp"]):
        for rows, width in SIZES:
            value = distribute_tensor(table_of(rows, width), mesh, [Shard(0)])
            assert load(gang, strategy, value, table_of(rows, width)) is None


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_meshes_that_are_parts_of_the_gang(pool, strategy):
    pool(4, over_parts, strategy)


def in_other_order(gang, strategy, size):
    """torch itself orders the ranks of such a mesh in two ways."""
    gang, ranks = last(gang, size)
    mesh = DeviceMesh("cpu", ranks[::-1])
    if gang is None:
        return
    for rows, width in SIZES[:2]:
        local = torch.zeros(rows // gang.size, width)
        value = DTensor.from_local(local, mesh, [Shard(0)], shape=(rows, width), stride=(width, 1))
        message = load(gang, strategy, value, table_of(rows, width))
        assert "must be a DTensor over a mesh of ascending ranks" in message


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [2, 3])
def test_mesh_in_another_order(pool, size, strategy):
    pool(4, in_other_order, strategy, size)


def of_one_kind_here(gang):
    """A rank with a different DTensor does not leave the others waiting."""
    mesh = DeviceMesh.from_group(gang.as_process_group(), "cpu")
    cut = Shard(0) if gang.rank else Shard(1)
    shape = (8, 2) if gang.rank else (8 // gang.size, 4)
    value = DTensor.from_local(torch.zeros(*shape), mesh, [cut], shape=(8, 4), stride=(4, 1))
    return load(gang, "vocab", value, table_of(8, 4))


def test_ranks_whose_cuts_differ(pool):
    for message in pool(2, of_one_kind_here):
        assert "`embed.weight` must be cut alike on all ranks of its gang" in message


def of_another_shape(gang):
    mesh = DeviceMesh.from_group(gang.as_process_group(), "cpu")
    return load(
        gang, "vocab", distribute_tensor(torch.zeros(6, 4), mesh, [Shard(1)]), table_of(8, 4)
    )


def test_other_shape(pool):
    for message in pool(2, of_another_shape):
        assert "`embed.weight` must have the shape (8, 4), but has (6, 4) instead" in message


def into_a_gang_of_one(gang):
    """A gang of a single process has no group, but a rank."""
    mine = DeviceMesh("cpu", torch.arange(4).view(4, 1), mesh_dim_names=("other", "own"))["own"]
    both = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    results = []
    for fake in (FakeGang("cpu"), FakeGang("cpu", rank=1, size=2)):
        for value in (
            distribute_tensor(table_of(3, 4), mine, [Shard(0)]),
            distribute_tensor(table_of(3, 4), both, [Replicate()]),
            distribute_tensor(table_of(3, 4), both, [Shard(0)]),
        ):
            message = load(fake, "vocab", value, table_of(3, 4))
            results.append(message is None)
    return results


def test_fake_gangs(pool):
    assert pool(4, into_a_gang_of_one) == [[True, True, False, False, True, False]] * 4
