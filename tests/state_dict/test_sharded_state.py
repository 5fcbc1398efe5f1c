"""Saving, copying and sharing models with sharded tables, by plain torch."""

from __future__ import annotations

import copy
import io
from multiprocessing.reduction import ForkingPickler

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tp_embed import StandardEmbedding, shard_embeddings
from tp_embed.checkpoint import hook_state_dict
from tp_embed.parameter.sharded import ShardedParameter

IDS = torch.tensor([[1, 1, 7], [10, 0, 3]])


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6, padding_idx=2)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.free = nn.Linear(6, 11)

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.head(hidden) + self.free(hidden)


def build(gang, strategy, seed=0):
    model = Model(seed)
    shard_embeddings(model, gang, strategy=strategy)
    return model


def step(model, optimizer, count=1):
    for _ in range(count):
        model(IDS).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tables(model):
    with hook_state_dict(model, "full"):
        return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, whole, atol=2e-6):
    found, expected = tables(model), whole.state_dict()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=atol)


def assert_sharded(model, gang):
    """Checks that the weight is still guarded, and tied."""
    assert isinstance(model.embed.weight, ShardedParameter) == (gang.size > 1)
    assert model.head.weight is model.embed.weight


def each_size(function):
    sizes = pytest.mark.parametrize("size", [1, 2, 3])
    return sizes(pytest.mark.parametrize("strategy", ["embed", "vocab"])(function))


def saved(gang, strategy, path):
    model = build(gang, strategy)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    for keep_vars in (False, True):
        state = model.state_dict(keep_vars=keep_vars)
        kinds = {type(value) for value in state.values()}
        assert (kinds == {torch.Tensor}) != keep_vars
        file = io.BytesIO()
        torch.save((state, optimizer.state_dict()), file)
        file.seek(0)
        loaded, of_optimizer = torch.load(file, weights_only=True)
        assert {type(value) for value in loaded.values()} <= {torch.Tensor, nn.Parameter}
        assert list(loaded) == list(state)
        other = build(gang, strategy, seed=1)
        other.load_state_dict(loaded)
        again = torch.optim.AdamW(other.parameters())
        again.load_state_dict(of_optimizer)
        step(other, again)
        whole = Model()
        of_whole = torch.optim.AdamW(whole.parameters())
        step(whole, of_whole, 2)
        assert_same(other, whole)
        assert_sharded(other, gang)
    file = f"{path}/{gang.rank}.safetensors"
    safetensors.torch.save_model(model, file)
    other = build(gang, strategy, seed=1)
    assert safetensors.torch.load_model(other, file) == (set(), [])
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found.detach(), expected.detach())
    assert_sharded(other, gang)
    state = model.state_dict()
    own = f"{path}/{gang.rank}"
    dcp.save(state, checkpoint_id=own, no_dist=True)
    other = build(gang, strategy, seed=1)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=own, no_dist=True)  # Into the memory of the weights.
    assert torch.equal(other.embed.weight.detach(), model.embed.weight.detach())


@each_size
def test_saved_state_dicts(pool, tmp_path, size, strategy):
    pool(size, saved, strategy, str(tmp_path))


def copied(gang, strategy):
    model = build(gang, strategy)
    model.embed.weight.requires_grad_(True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.embed.weight.data_ptr() != model.embed.weight.data_ptr()
        assert_sharded(other, gang)
        optimizer, whole = torch.optim.AdamW(other.parameters()), Model()
        step(other, optimizer, 2)
        step(whole, torch.optim.AdamW(whole.parameters()), 2)
        assert_same(other, whole)
        assert_same(model, Model())


@each_size
def test_copies_and_pickles(pool, size, strategy):
    pool(size, copied, strategy)


def swapped(gang, strategy):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, whole = build(gang, strategy), Model()
        weight = model.embed.weight
        for each in (model, whole):
            each.double().float()
            each.load_state_dict(each.state_dict())
        assert model.embed.weight is weight  # That is its purpose.
        assert_sharded(model, gang)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer, of_whole = (torch.optim.AdamW(each.parameters()) for each in (model, whole))
    step(model, optimizer, 2)
    step(whole, of_whole, 2)
    assert_same(model, whole)


@each_size
def test_swapped_parameters(pool, size, strategy):
    pool(size, swapped, strategy)


def shared(gang, strategy):
    model = build(gang, strategy).share_memory()
    assert model.embed.weight.is_shared()
    assert_sharded(model, gang)
    assert_same(model, Model())
    for copied in (model.embed.weight, model.embed.weight.data):
        data = ForkingPickler.dumps(copied)
        found = ForkingPickler.loads(data)
        assert torch.equal(found.detach(), model.embed.weight.detach())
        assert found.data_ptr() != 0


@each_size
def test_shared_memory(pool, size, strategy):
    pool(size, shared, strategy)


def loaded_kinds(gang, strategy):
    """Loads a ShardedTensor, DTensor, table, shard and ShardedParameter; strictly or not."""
    source = build(gang, strategy)
    states = [source.state_dict(), source.state_dict(keep_vars=True), Model().state_dict()]
    with hook_state_dict(source, "dtensor"):
        states.append(source.state_dict())
    dim = source.embed.shard_dim
    block = source.embed.partition.shard(gang.rank)
    offsets = [0, block.start] if dim else [block.start, 0]
    if len(block):
        shard = Shard.from_tensor_and_offsets(
            source.state_dict()["embed.weight"], offsets, torch.distributed.get_rank()
        )
        tensor = ShardedTensor._init_from_local_shards(
            [shard], 11, 6, process_group=gang.as_process_group()
        )
        states.append({**states[2], "embed.weight": tensor, "head.weight": tensor})
    for state in states:
        for strict in (True, False):
            model = build(gang, strategy, seed=1)
            partial = {k: v for k, v in state.items() if strict or k != "free.bias"}
            with hook_state_dict(model):
                result = model.load_state_dict(partial, strict=strict)
            assert result.missing_keys == ([] if strict else ["free.bias"])
            assert torch.equal(tables(model)["embed.weight"], Model().embed.weight.detach())
            assert_sharded(model, gang)


@each_size
def test_loaded_kinds(pool, size, strategy):
    pool(size, loaded_kinds, strategy)


def averaged(gang, strategy, is_ema):
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if is_ema else {}
    model, whole = build(gang, strategy), Model()
    averages = []
    for each in (model, whole):
        optimizer = torch.optim.AdamW(each.parameters())
        average = AveragedModel(each, **options)
        for _ in range(3):
            step(each, optimizer)
            average.update_parameters(each)
        averages.append(average)
    average, of_whole = (each.module for each in averages)
    assert_same(average, of_whole)
    torch.testing.assert_close(average(IDS), of_whole(IDS), rtol=0, atol=1e-5)


@each_size
def test_averaged_models(pool, size, strategy):
    pool(size, averaged, strategy, False)
    pool(size, averaged, strategy, True)


def flattened(gang, strategy):
    """Flattens this rank's Parameters into a vector, and restores them."""
    model, other = build(gang, strategy), build(gang, strategy, seed=1)
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert vector.numel() == sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(vector, other.parameters())
    assert_sharded(other, gang)
    assert_same(other, Model())


@each_size
def test_vectors_of_parameters(pool, size, strategy):
    pool(size, flattened, strategy)


def round_trip(gang, strategy):
    model = build(gang, strategy)
    whole = model.embed.to_embedding()
    assert type(whole) is StandardEmbedding
    assert type(whole.weight) is nn.Parameter
    assert torch.equal(whole.weight.detach(), Model().embed.weight.detach())
    assert whole.pad_idx == 2
    again = type(model.embed).from_embedding(whole, gang)
    assert torch.equal(again.weight.detach(), model.embed.weight.detach())
    assert again.weight.data_ptr() != model.embed.weight.data_ptr()
    assert isinstance(again.weight, ShardedParameter) == (gang.size > 1)


@each_size
def test_round_trips_of_classes(pool, size, strategy):
    pool(size, round_trip, strategy)


def of_rank_0(gang, strategy):
    """A state saved by one rank for all is a wrong shard on the others."""
    model = build(gang, strategy)
    box = [None]
    if gang.rank == 0:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        box = [file.getvalue()]
    gang.broadcast_objects(box)
    state = torch.load(io.BytesIO(box[0]), weights_only=True)
    other = build(gang, strategy, seed=1)
    before = other.embed.weight.detach().clone()
    try:
        other.load_state_dict(state)
    except RuntimeError as e:
        assert torch.equal(other.embed.weight.detach(), before)
        return str(e)
    return None


@each_size
def test_shard_that_one_rank_saved_for_all(pool, size, strategy):
    own, *others = pool(size, of_rank_0, strategy)
    assert own is None
    for message in others:
        assert "must be this rank's shard" in message or "size mismatch" in message
