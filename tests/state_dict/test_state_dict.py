"""State dicts of sharded models: whole, in shards and as DTensors, compared with the unsharded
model, and with torch's own distributed checkpoints."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.tensor import DTensor

from tp_embed import FakeGang, StandardEmbedding, VocabShardedEmbedding, shard_embeddings
from tp_embed.checkpoint import full_state_dict, hook_state_dict

V, E = 11, 6
KEYS = ["embed.weight", "other.weight", "mix.weight", "mix.bias", "head.weight"]


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(V, E)
        self.other = nn.Embedding(3, E)  # Fewer rows than four ranks.
        self.mix = nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.embed.weight


def sharded(gang, strategy, seed=0):
    model = Model(seed)
    shard_embeddings(model, gang, strategy=strategy)
    return model


def assert_equal(state, expected):
    assert list(state) == list(expected)
    for key in expected:
        assert torch.equal(state[key], expected[key]), key


def round_trips(gang, strategy, loaded_as):
    expected = Model().state_dict()
    model = sharded(gang, strategy)
    states = {}
    for mode in ("full", "sharded", "dtensor"):
        with hook_state_dict(model, mode):
            states[mode] = model.state_dict()
    assert_equal(states["full"], expected)
    assert states["full"]["embed.weight"] is states["full"]["head.weight"]
    assert isinstance(states["dtensor"]["embed.weight"], DTensor)
    assert_equal({k: _whole(t) for k, t in states["dtensor"].items()}, expected)
    assert states["sharded"]["embed.weight"].shape == model.embed.weight.shape
    assert model.state_dict()["embed.weight"].shape == model.embed.weight.shape  # As without hooks.

    for mode, state in states.items():
        # Whole tables and DTensors load with any strategy, shards only with their own.
        other = sharded(gang, strategy if mode == "sharded" else loaded_as, seed=1)
        with hook_state_dict(other):
            result = other.load_state_dict(state)
            assert (result.missing_keys, result.unexpected_keys) == ([], [])
            assert_equal(other.state_dict(), expected)
        assert other.head.weight is other.embed.weight


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("loaded_as", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_round_trips(pool, size, strategy, loaded_as):
    pool(size, round_trips, strategy, loaded_as)


def of_one_rank(gang, rank):
    model = sharded(gang, "vocab")
    state = full_state_dict(model, rank=rank)
    return None if state is None else {key: t.tolist() for key, t in state.items()}


def test_full_state_dict_of_one_rank(pool):
    expected = {key: t.tolist() for key, t in Model().state_dict().items()}
    assert pool(3, of_one_rank, 1) == [None, expected, None]


def alone(gang):
    """A rank saves its shard without the others."""
    if gang.rank == 1:
        model = sharded(FakeGang("cpu", rank=1, size=gang.size), "vocab")
        with hook_state_dict(model, "sharded"):
            return list(model.state_dict())
    return None


def test_shards_are_saved_without_the_others(pool):
    assert pool(2, alone)[1] == KEYS


def save_distributed(gang, strategy, path):
    model = sharded(gang, strategy)
    with hook_state_dict(model, "dtensor"):
        dcp.save(model.state_dict(), checkpoint_id=path)


def load_distributed(gang, strategy, path):
    model = sharded(gang, strategy, seed=1)
    with hook_state_dict(model, "dtensor"):
        state = model.state_dict()
        dcp.load(state, checkpoint_id=path)
        model.load_state_dict(state)
    with hook_state_dict(model, "full"):
        assert_equal(model.state_dict(), Model().state_dict())


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_distributed_checkpoint(pool, tmp_path, strategy):
    pool(4, save_distributed, strategy, str(tmp_path))
    # By plain torch, in one process, into the unsharded model.
    model = Model(seed=1)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert_equal(state, Model().state_dict())
    for loaded_as in ("embed", "vocab"):
        pool(4, load_distributed, loaded_as, str(tmp_path))


def local_shards(gang):
    """Returns a ShardedTensor over rows, as torch's older sharding makes."""
    table = Model().embed.weight.detach()
    sizes = -(-V // gang.size)
    start = min(gang.rank * sizes, V)
    rows = table[start : start + sizes].clone()
    local = [
        Shard.from_tensor_and_offsets(rows, [start, 0], torch.distributed.get_rank()),
    ]
    tensor = ShardedTensor._init_from_local_shards(
        local, V, E, process_group=gang.as_process_group()
    )
    embed = VocabShardedEmbedding(gang, V, E)
    with hook_state_dict(embed):
        embed.load_state_dict({"weight": tensor})
        assert torch.equal(embed.state_dict()["weight"], table)
    columns = nn.Sequential(nn.Embedding(V, E))
    shard_embeddings(columns, gang, strategy="embed")
    with (
        hook_state_dict(columns),
        pytest.raises(RuntimeError, match="must have a local shard"),
    ):
        columns.load_state_dict({"0.weight": tensor})


def test_sharded_tensor(pool):
    pool(2, local_shards)


MIDDLE = FakeGang("cpu", rank=1, size=3)


def test_shard_of_another_rank_is_refused():
    model, last = (sharded(FakeGang("cpu", rank=rank, size=3), "vocab") for rank in (1, 0))
    before = model.embed.weight.clone()
    with hook_state_dict(last, "sharded"):
        file = io.BytesIO()
        torch.save(last.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    state["mix.weight"] = model.mix.weight.detach()
    with hook_state_dict(model), pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    message = str(error.value)
    assert "`embed.weight` must be whole or this rank's shard {'dim': 0, 'rank': 1" in message
    assert "is the shard {'dim': 0, 'rank': 0, 'num_shards': 3} instead" in message
    assert "size mismatch" not in message
    assert torch.equal(model.embed.weight, before)


def test_bad_tables_and_keys():
    model = sharded(MIDDLE, "vocab")
    state = Model().state_dict()
    with hook_state_dict(model):
        with pytest.raises(RuntimeError, match=r"must have the shape \(11, 6\), or \(4, 6\) as"):
            model.load_state_dict({**state, "embed.weight": torch.zeros(12, 6)})
        with pytest.raises(RuntimeError, match="Missing key") as error:
            model.load_state_dict({k: t for k, t in state.items() if k != "other.weight"})
        assert "other.weight" in str(error.value)
        result = model.load_state_dict({"more": torch.zeros(1)}, strict=False)
        assert result.unexpected_keys == ["more"]
        assert result.missing_keys == KEYS
    with pytest.raises(ValueError, match=r"`mode` must be one of .* but is 'whole' instead"):
        hook_state_dict(model, "whole").__enter__()


def test_hooks_end_with_the_context():
    model = sharded(MIDDLE, "embed")
    with hook_state_dict(model):
        pass
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(Model().state_dict())


def test_whole_tables_are_as_they_were():
    model = nn.Sequential(StandardEmbedding(V, E))
    with hook_state_dict(model):
        assert model.state_dict()["0.weight"].shape == (V, E)
