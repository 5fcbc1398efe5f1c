"""State dicts of optimizers of sharded tables, compared with an unsharded model: whole, in shards,
and through torch's distributed checkpoints between any two gangs."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from tp_embed import FakeGang, shard_embeddings
from tp_embed.checkpoint import hook_state_dict

IDS = torch.tensor([[1, 1, 7], [10, 0, 3]])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.small = nn.Embedding(2, 6)  # Fewer rows than three ranks.
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids) + self.small(ids % 2)))


def groups(model):
    tables = [model.embed.weight]
    others = [model.small.weight, *model.mix.parameters()]
    return [{"params": tables, "weight_decay": 0.1}, {"params": others, "lr": 0.03}]


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, amsgrad=True),
    "groups": lambda model: torch.optim.AdamW(groups(model), lr=0.05),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05),
}


def build(gang=None, strategy="vocab", name="adamw"):
    model = Model()
    if gang is not None:
        shard_embeddings(model, gang, strategy=strategy)
    return model, OPTIMIZERS[name](model)


def train(model, optimizer, steps):
    for _ in range(steps):
        model(IDS).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_trains_on(model, optimizer, name):
    """Checks that training after three steps continues like the unsharded model's."""
    whole, of_whole = build(name=name)
    train(whole, of_whole, 3)
    for _ in range(2):
        with hook_state_dict(model, "full", optimizer=optimizer):
            assert_close(model.state_dict(), whole.state_dict())
            assert_close(optimizer.state_dict(), of_whole.state_dict())
        train(model, optimizer, 2)
        train(whole, of_whole, 2)


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    """Sums over a sharded head round in another order."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key], rtol, atol)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rtol, atol)
    else:
        assert found == expected


def whole_states(model, optimizer):
    with hook_state_dict(model, "full", optimizer=optimizer):
        return dict(model.state_dict()), optimizer.state_dict()


def save(gang, strategy, name, path, options):
    model, optimizer = build(gang, strategy, name)
    train(model, optimizer, 3)
    with hook_state_dict(model, "dtensor", optimizer=optimizer):
        state, of_optimizer = get_state_dict(model, optimizer, options=options)
        states = {"model": state, "optimizer": of_optimizer}
        dcp.save(states, checkpoint_id=path, process_group=gang.as_process_group())
    states = whole_states(model, optimizer)
    if gang.rank == 0:
        torch.save(states, f"{path}.whole")
    return {k: list(v.shape) for k, v in of_optimizer.items() if isinstance(v, DTensor)}


def load(gang, strategy, name, path, options):
    model, optimizer = build(gang, strategy, name)
    with hook_state_dict(model, "dtensor", optimizer=optimizer):
        state, of_optimizer = get_state_dict(model, optimizer, options=options)
        states = {"model": state, "optimizer": of_optimizer}
        dcp.load(states, checkpoint_id=path, process_group=gang.as_process_group())
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state,
            optim_state_dict=of_optimizer,
            options=options,
        )
    assert_close(whole_states(model, optimizer), torch.load(f"{path}.whole"), rtol=0, atol=0)
    assert_trains_on(model, optimizer, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_resharding(pool, tmp_path, strategy, name):
    """From 2 to 3 to 1 ranks, with the other cut, and in plain torch."""
    pool(2, save, strategy, name, str(tmp_path), None)
    for size, other in ((3, strategy), (1, strategy), (2, "embed"), (3, "vocab")):
        pool(size, load, other, name, str(tmp_path), None)
    model, optimizer = build(name=name)
    state, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": of_optimizer}, checkpoint_id=str(tmp_path), no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=of_optimizer)
    assert_trains_on(model, optimizer, name)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_flattened(pool, tmp_path, strategy):
    shapes = pool(2, save, strategy, "groups", str(tmp_path), FLAT)[0]
    assert shapes["state.embed.weight.exp_avg"] == [11, 6]
    for size in (1, 3):
        pool(size, load, strategy, "groups", str(tmp_path), FLAT)


def through_whole(gang, strategy, mode, cpu_offload, broadcast):
    """Loads a state dict that torch gathers on each rank, or on one."""
    model, optimizer = build(gang, strategy)
    train(model, optimizer, 3)
    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    with hook_state_dict(model, mode, optimizer=optimizer):
        state = get_model_state_dict(model, options=options)
        of_optimizer = get_optimizer_state_dict(model, optimizer, options=options)
    whole, of_whole = build()
    train(whole, of_whole, 3)
    # torch returns it on rank 0 of the job, if it goes to the CPU.
    if not cpu_offload or torch.distributed.get_rank() == 0:
        assert_close(state, whole.state_dict())
        assert_close(of_optimizer, get_optimizer_state_dict(whole, of_whole))
    if not cpu_offload or broadcast:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        other, of_other = build(gang, strategy)
        with hook_state_dict(other, mode, optimizer=of_other):
            set_model_state_dict(other, state, options=options)
            set_optimizer_state_dict(other, of_other, of_optimizer, options=options)
        assert_trains_on(other, of_other, "adamw")


@pytest.mark.parametrize("mode", ["full", "dtensor"])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_full_state_dict_option(pool, size, strategy, mode):
    pool(size, through_whole, strategy, mode, False, False)


@pytest.mark.parametrize("mode", ["full", "dtensor"])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_state_dict_of_rank_0(pool, strategy, mode):
    pool(4, through_whole, strategy, mode, True, True)


def forms(gang, strategy, name):
    """Loads each form, through a file, into a new optimizer."""
    model, optimizer = build(gang, strategy, name)
    train(model, optimizer, 3)
    for mode in ("full", "sharded", "dtensor"):
        with hook_state_dict(model, mode, optimizer=optimizer):
            states = model.state_dict(), optimizer.state_dict()
        if mode != "dtensor":
            file = io.BytesIO()
            torch.save(states, file)
            file.seek(0)
            states = torch.load(file, weights_only=True)
        other, of_other = build(gang, strategy, name)
        with hook_state_dict(other, mode, optimizer=of_other):
            other.load_state_dict(states[0])
            of_other.load_state_dict(states[1])
        for state in of_other.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.numel():
                    assert value.untyped_storage().nbytes() == value.nbytes
        assert_trains_on(other, of_other, name)
    # Without hooks, as in torch.
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_forms(pool, size, strategy, name):
    pool(size, forms, strategy, name)


def test_shard_of_another_rank_is_refused():
    gangs = [FakeGang("cpu", rank=rank, size=3) for rank in (0, 1)]
    (first, of_first), (second, of_second) = (build(gang) for gang in gangs)
    train(first, of_first, 1)
    with hook_state_dict(first, "sharded", optimizer=of_first):
        state = of_first.state_dict()
    with (
        hook_state_dict(second, "sharded", optimizer=of_second),
        pytest.raises(
            ValueError, match=r"`embed.weight.exp_avg` must be whole or this rank's shard"
        ),
    ):
        of_second.load_state_dict(state)
    assert not of_second.state


class RowSums(torch.optim.SGD):
    """Keeps a number per row besides the moments."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["row_var"] = torch.ones(parameter.size(0), 1)


def factored(gang, mode, strategy):
    model = Model()
    shard_embeddings(model, gang, strategy=strategy)
    optimizer = RowSums(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    with hook_state_dict(model, mode, optimizer=optimizer):
        try:
            state = optimizer.state_dict()
        except ValueError as e:
            return str(e)
        optimizer.load_state_dict(state)
    return None


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_factored_states(pool, strategy):
    """As in Adafactor: sums over rows or columns are not blocks of a table."""
    for mode in ("full", "dtensor"):
        for message in pool(2, factored, mode, strategy):
            assert "`embed.weight.row_var` has the shape" in message
            assert "hook_state_dict(model, 'sharded', optimizer=...)" in message
    assert pool(2, factored, "sharded", strategy) == [None, None]
    assert pool(1, factored, "full", strategy) == [None]


def test_bad_optimizers():
    model, _ = build(FakeGang("cpu", rank=0, size=2))
    other, of_other = build()
    with pytest.raises(ValueError, match="must hold Parameters of `model`"):
        hook_state_dict(model, optimizer=of_other).__enter__()
    with pytest.raises(
        TypeError, match=r"must be a `torch.optim.Optimizer`.* is a `Model` instead"
    ):
        hook_state_dict(model, optimizer=[other]).__enter__()
    # No hook remains.
    assert not model._state_dict_hooks
    assert not model._load_state_dict_pre_hooks


def test_table_of_another_size_is_refused():
    model, optimizer = build(FakeGang("cpu", rank=0, size=3))
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    state["state"] = {0: {**state["state"][0], "exp_avg": torch.zeros(12, 6)}}
    message = r"`embed.weight.exp_avg` must have the shape \(11, 6\), or \(4, 6\)"
    with (
        hook_state_dict(model, optimizer=optimizer),
        pytest.raises(ValueError, match=message),
    ):
        optimizer.load_state_dict(state)


def left_out(gang, strategy, mode, has_stepped):
    """Without its name, an optimizer would save one rank's moments for all."""
    model, optimizer = build(gang, strategy)
    if has_stepped:
        train(model, optimizer, 1)
    other, of_other = build()
    with hook_state_dict(model, mode):
        if gang.size > 1 and mode != "sharded":
            with pytest.raises(ValueError, match=r"`embed.weight` must .* `optimizer=optimizer`"):
                get_state_dict(model, optimizer)
        else:
            optimizer.state_dict()
        get_state_dict(other, of_other)  # Belongs to no table here.
    optimizer.state_dict()


@pytest.mark.parametrize("mode", ["full", "sharded", "dtensor"])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2])
def test_optimizer_that_is_left_out(pool, size, strategy, mode):
    for has_stepped in (False, True):
        pool(size, left_out, strategy, mode, has_stepped)
