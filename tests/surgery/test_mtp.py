"""Compares models with several heads over one table, sharded, with the same model in one process:
losses, gradients and their norm, and the Parameters after some steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tp_embed
from mtp_models import DEPTH, MODELS, batches, build
from tp_embed import OutputHead, shard_embeddings
from tp_embed.checkpoint import full_state_dict, hook_state_dict

STEPS, LR, CLIP = 3, 0.05, 0.3
OPTIONS = [
    {"strategy": "vocab"},
    {"strategy": "embed"},
    {"strategy": "auto"},
    {"strategy": "vocab", "output": "sequence", "head_input": "sequence"},
    {"strategy": "embed", "output": "sequence", "head_input": "sequence"},
]


def train_alone(name):
    return train(build(name), nn.utils.clip_grad_norm_)


def train(model, clip, gang=None, is_cut=False):
    """Returns losses, norms, and the state."""
    # The default `eps` would turn rounding of gradients near 0 into steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-4, foreach=False)
    losses, norms = [], []
    for ids in batches(STEPS):
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        if is_cut:  # Other layers have seen this rank's positions only.
            for layer in (model.between, *(mtp.mix for mtp in model.mtp)):
                for parameter in layer.parameters():
                    gang.all_reduce(parameter.grad)
        norms.append(float(clip(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {key: value.detach().clone() for key, value in model.state_dict().items()}


def train_sharded(gang, name, options):
    model = build(name)
    report = shard_embeddings(model, gang, **options)
    names = [parameter_name for parameter_name, _ in model.named_parameters()]
    tables = [key for key in names if key in ("embed.weight", "head.weight")]
    assert len(report.tables) == len(tables) == (1 if MODELS[name].get("tied", True) else 2)
    heads = [model.head, *(mtp.head for mtp in model.mtp)]
    assert all(isinstance(head, OutputHead) and head.weight is heads[0].weight for head in heads)
    assert len({*heads}) == (1 if MODELS[name].get("same") else DEPTH + 1)
    is_cut = options.get("head_input") == "sequence"
    with hook_state_dict(model):
        return train(model, tp_embed.clip_grad_norm_, gang, is_cut)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_one_process(pool, name, size):
    losses, norms, state = train_alone(name)
    assert min(norms) > CLIP  # Clipping takes effect.
    for options in OPTIONS:
        for found in pool(size, train_sharded, name, options):
            assert found[0] == pytest.approx(losses, rel=1e-5), options
            assert found[1] == pytest.approx(norms, rel=1e-5), options
            assert found[2].keys() == state.keys()
            torch.testing.assert_close(found[2], state, rtol=1e-4, atol=1e-5)


def gradients(gang, name, strategy):
    """Gradients, exact in fp64, and that several backwards add up to the one of the sum."""
    model = build(name).double()
    expected = build(name).double()
    [ids] = batches(1)
    expected(ids).backward()
    shard_embeddings(model, gang, strategy=strategy)
    for _ in range(2):
        model.zero_grad()
        model(ids).backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, parameter in expected.named_parameters():
        grad = found[key]
        module = model.get_submodule(key.rpartition(".")[0])
        if hasattr(module, "shard_dim") and key.endswith("weight"):
            own = module.partition.shard(gang.rank)
            wanted = parameter.grad.narrow(module.shard_dim, own.start, len(own))
        else:
            wanted = parameter.grad
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13, msg=key)


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_exact(pool, name, size, strategy):
    pool(size, gradients, name, strategy)


def round_trips(gang, name, strategy):
    expected = build(name).state_dict()
    model, other = build(name), build(name)
    for each in (model, other):
        shard_embeddings(each, gang, strategy=strategy)
    gathered = full_state_dict(model)
    if gang.rank == 0:
        torch.testing.assert_close(gathered, expected, rtol=0, atol=0)
    for mode in ("full", "sharded", "dtensor"):
        with hook_state_dict(model, mode):
            state = model.state_dict()
        assert state.keys() == expected.keys()
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        with hook_state_dict(other):
            other.load_state_dict(state)
            torch.testing.assert_close(other.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_are_whole_under_every_name(pool, name, size, strategy):
    pool(size, round_trips, name, strategy)
