"""Optimizers built before the tables were sharded continue training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parity import whole
from tp_embed import FakeGang, shard_embeddings

V, E = 11, 6


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, E)
        self.mix = nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)).tanh())


def optimizer_of(model):
    groups = [
        {"params": [model.embed.weight], "weight_decay": 0.1},
        {"params": list(model.mix.parameters()), "lr": 0.03},
    ]
    return torch.optim.AdamW(groups, lr=0.1)


def train(model, optimizer, steps):
    for step in steps:
        ids = torch.randint(V, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids[:-1]), ids[1:]).backward()
        optimizer.step()


def go_on_sharded(gang, strategy, tied):
    expected = Model(tied)
    optimizer = optimizer_of(expected)
    train(expected, optimizer, range(4))

    model = Model(tied)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    shard_embeddings(model, gang, strategy=strategy, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"] == [model.embed.weight]
    assert set(optimizer.state) == {p for g in optimizer.param_groups for p in g["params"]}
    train(model, optimizer, range(2, 4))
    torch.testing.assert_close(
        whole(model.embed, model.embed.weight.detach()), expected.embed.weight
    )
    torch.testing.assert_close(model.mix.weight, expected.mix.weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_training_goes_on(pool, strategy, tied):
    for size in (1, 3):
        pool(size, go_on_sharded, strategy, tied)


def test_parameters_and_groups():
    model = Model(tied=False)
    gang = FakeGang("cpu", rank=1, size=3)
    plain = list(model.parameters())
    shard_embeddings(model, gang, parameters=plain)
    assert plain == list(model.parameters())

    model = Model(tied=False)
    old = model.embed.weight
    groups = [{"params": (p for p in [old]), "lr": 1.0}, {"params": model.mix.weight}]
    shard_embeddings(model, gang, parameters=groups)
    assert groups == [
        {"params": [model.embed.weight], "lr": 1.0},
        {"params": [model.mix.weight]},
    ]

    model = Model(tied=False)
    named = list(model.named_parameters())
    shard_embeddings(model, gang, parameters=named)
    assert [name for name, p in named if p is model.embed.weight] == ["embed.weight"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda model: model.parameters(),
            TypeError,
            "be a list, .* is a `generator` instead",
        ),
        (lambda model: [{"lr": 0.1}], TypeError, r"groups with `params`, but holds \['dict'\]"),
        (lambda model: ["embed.weight"], TypeError, r"but holds \['str'\] instead"),
        (lambda model: list(Model(False).parameters()), ValueError, "but holds none of them"),
    ],
)
def test_bad_parameters_leave_the_model_as_it_was(make, error, message):
    model = Model(tied=False)
    with pytest.raises(error, match=f"`parameters` must .*{message}"):
        shard_embeddings(model, FakeGang("cpu", rank=1, size=3), parameters=make(model))
    assert type(model.embed) is nn.Embedding


def test_optimizer_of_another_model():
    model, other = Model(tied=False), optimizer_of(Model(tied=False))
    with pytest.raises(
        ValueError, match=r"`optimizer\.param_groups` must hold Parameters of `model`"
    ):
        shard_embeddings(model, FakeGang("cpu", rank=1, size=3), optimizer=other)
    assert type(model.embed) is nn.Embedding
