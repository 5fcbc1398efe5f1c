"""Elementwise optimizers train shards; others are refused by name."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
import transformers
from test_norms import Model, V, assert_same_on_all_ranks, backward, models
from torch import nn

import tp_embed
from tp_embed import FakeGang, OutputHead, ShardedEmbedding, VocabShardedEmbedding
from tp_embed.parameter.optimizers import needs_matrix

GANG = FakeGang("cpu", rank=1, size=3)

REFUSED = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01),
}
OF_TRANSFORMERS = {
    "Adafactor": lambda p: transformers.Adafactor(p),
}
ELEMENTWISE = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive steps; You et al., 2020."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                trust = p.data.norm() / p.grad.norm()
                p.data.add_(p.grad, alpha=-group["lr"] * float(trust))


class Signs(torch.optim.Optimizer):
    """An unknown elementwise optimizer."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign() * group["lr"])


class Rows(Signs):
    """An unknown optimizer that uses whole rows."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((p.grad**2).mean(-1, keepdim=True).sqrt() * group["lr"])


class Spectral(Rows):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad @ p.grad.T


class Quiet(torch.optim.AdamW):
    """A subclass that inherits the step of a known class."""


def layers():
    yield (embed := ShardedEmbedding(GANG, V, 6))
    yield VocabShardedEmbedding(GANG, V, 6)
    yield OutputHead(embed)


def run(layer):
    if isinstance(layer, OutputHead):
        layer(torch.ones(2, 6)).sum().backward()
    else:
        layer(torch.arange(V)).sum().backward()


def trains_as_whole(gang, strategy, name):
    expected, model = models(gang, strategy)
    optimizers = [ELEMENTWISE[name](m.parameters()) for m in (expected, model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            for m, optimizer in zip((expected, model), optimizers, strict=True):
                optimizer.zero_grad()
                backward(m, step)
                optimizer.step()
    table = model.embed.to_embedding().weight
    # Optimizers that use the sign of a gradient amplify rounding.
    torch.testing.assert_close(table, expected.embed.weight, rtol=1e-4, atol=2e-5)
    assert_same_on_all_ranks(gang, model.norm.weight)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(pool, name):
    for strategy in ("embed", "vocab"):
        for size in (1, 2, 3):
            pool(size, trains_as_whole, strategy, name)


@pytest.mark.parametrize("name", [*REFUSED, *OF_TRANSFORMERS, "Lamb"])
def test_refused_at_the_first_step(name):
    for layer in layers():
        run(layer)
        make = {**REFUSED, **OF_TRANSFORMERS, "Lamb": Lamb}[name]
        optimizer = make(layer.parameters())
        with pytest.raises(ValueError, match=rf"by itself, but is `{name}` instead.*`torch.optim"):
            optimizer.step(lambda: torch.ones(()))
        assert not optimizer.state.get(layer.weight)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_shard_embeddings(name):
    model = Model(tied=True)
    optimizer = REFUSED[name]([p for p in model.parameters() if p.ndim == 2])
    with pytest.raises(ValueError, match=rf"a table of the shape \(11, 6\) .* is `{name}` instead"):
        tp_embed.shard_embeddings(model, GANG, optimizer=optimizer)
    assert type(model.embed) is nn.Embedding
    tp_embed.shard_embeddings(model, GANG, strategy="none", optimizer=optimizer)


@pytest.mark.parametrize("make", [*REFUSED.values(), Lamb])
def test_whole_tables_and_other_parameters_train(make):
    whole = VocabShardedEmbedding(FakeGang("cpu"), V, 6)
    run(whole)
    model = Model(tied=False)
    tp_embed.shard_embeddings(model, GANG)
    backward(model)
    for parameters in ([whole.weight], [model.head.weight]):
        make(parameters).step(lambda: torch.ones(()))


def test_groups_that_a_muon_leaves_to_adam():
    class MuonWithAuxAdam(torch.optim.AdamW):
        pass

    embed = ShardedEmbedding(GANG, V, 6)
    run(embed)
    MuonWithAuxAdam([{"params": [embed.weight], "use_muon": False}]).step()
    with pytest.raises(ValueError, match="is `MuonWithAuxAdam` instead"):
        MuonWithAuxAdam([{"params": [embed.weight], "use_muon": True}]).step()


def test_unknown_optimizers_are_named_once():
    embed = ShardedEmbedding(GANG, V, 6)
    run(embed)
    with pytest.warns(UserWarning, match="`Signs` trains sharded tables, and is unknown"):
        Signs(embed.parameters()).step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Signs(embed.parameters()).step()
        Quiet(embed.parameters()).step()
    with (
        pytest.warns(UserWarning, match="`Rows` trains sharded tables"),
        pytest.raises(ValueError, match="`mean` must be given the whole table"),
    ):
        Rows(embed.parameters()).step()
    with (
        pytest.warns(UserWarning, match="`Spectral` trains sharded tables"),
        pytest.raises(ValueError, match="`T` must be given the whole table"),
    ):
        Spectral(embed.parameters()).step()


def test_groups_that_are_added_later():
    model = Model(tied=False)
    tp_embed.shard_embeddings(model, GANG)
    backward(model)
    optimizer = torch.optim.Muon([model.head.weight])
    optimizer.step()
    optimizer.add_param_group({"params": [model.embed.weight]})
    with pytest.raises(ValueError, match="is `Muon` instead"):
        optimizer.step()


@pytest.mark.parametrize("size", [1, 3])
def test_optimizers_of_the_tables_that_were_replaced(size):
    model = Model(tied=True)
    old = model.embed.weight
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    tp_embed.shard_embeddings(model, FakeGang("cpu", size=size))
    backward(model)
    with pytest.raises(ValueError, match="holds a whole table that `shard_embeddings"):
        optimizer.step()
    old.grad = torch.ones_like(old)  # Training continues elsewhere.
    torch.optim.AdamW([old]).step()


class Counts(torch.optim.Optimizer):
    """Keeps state of another shape than the Parameter."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": torch.ones(()), "rows": torch.zeros(p.size(0), 1)}


@pytest.mark.parametrize("size", [1, 3])
def test_states_that_cannot_be_cut(size):
    model = Model(tied=False)
    optimizer = Counts([model.embed.weight])
    optimizer.step()
    gang = FakeGang("cpu", size=size)
    if size == 1:
        tp_embed.shard_embeddings(model, gang, optimizer=optimizer)
        assert optimizer.state[model.embed.weight]["rows"].shape == (V, 1)
        return
    with pytest.raises(ValueError, match=re.escape("'rows' has (11, 1) instead")):
        tp_embed.shard_embeddings(model, gang, optimizer=optimizer)
    assert type(model.embed) is nn.Embedding


def test_names():
    assert needs_matrix("Lamb")
    assert needs_matrix("adafactor")
    assert needs_matrix(torch.optim.Muon)
    assert needs_matrix(functools.partial(torch.optim.Muon, lr=0.1))
    assert not needs_matrix("AdamW")
    assert not needs_matrix(functools.partial(torch.optim.AdamW, lr=0.1))
    assert not needs_matrix(lambda parameters: None)
