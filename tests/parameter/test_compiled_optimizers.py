"""Compiled steps of optimizers train shards as they train whole tables."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from parity import SHARDED, assert_same_bits
from tp_embed import StandardEmbedding

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "SGD, Nesterov": partial(
        torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "SGD, foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
    "AdamW, foreach": partial(torch.optim.AdamW, lr=0.1, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
}
V, E = 11, 5
IDS = torch.tensor([[1, 2, 10], [4, 2, 0]])


def whole_table():
    torch.manual_seed(0)
    return StandardEmbedding(V, E)


def train(embed, name):
    torch.compiler.reset()
    optimizer = OPTIMIZERS[name](embed.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)  # Shows momentum that is the gradient's memory.
        embed(IDS).square().sum().backward()
        step()
    return embed.weight


def train_all(gang, name):
    expected = train(whole_table(), name)
    for kind, embedding in SHARDED.items():
        embed = embedding.from_embedding(whole_table(), gang)
        train(embed, name)
        assert_same_bits(embed.to_embedding().weight, expected, kind)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_compiled_steps_are_those_of_whole_tables(pool, size, name):
    pool(size, train_all, name)
