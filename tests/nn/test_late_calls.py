"""Losses of deferred logits run the head's hooks once, in the modes of the head's call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from parity import SHARDED
from tp_embed import OutputHead, StandardEmbedding
from tp_embed.nn.deferred import DeferredLogitsError

V, E = 11, 6
HOOKS = {
    "before": lambda head: head.register_forward_pre_hook(lambda m, args: (args[0] / 4,)),
    "after": lambda head: head.register_forward_hook(lambda m, args, y: y * 0.25),
    "both": lambda head: (
        head.register_forward_pre_hook(lambda m, args: (args[0] / 4,)),
        head.register_forward_hook(lambda m, args, y: y / 3, always_call=True),
    ),
}


def problem(gang, kind, dtype=torch.float64):
    """Returns a head, the same linear layer, hidden states and targets."""
    torch.manual_seed(0)
    linear = nn.Linear(E, V, bias=False, dtype=dtype)
    table = StandardEmbedding(V, E, dtype=dtype)
    table.weight.data.copy_(linear.weight)
    embed = SHARDED[kind].from_embedding(table, gang)
    x = torch.randn(5, E, dtype=dtype)
    return OutputHead(embed, output="deferred"), linear, x, torch.randint(V, (5,))


def compare_hooks(gang, kind, name):
    head, linear, x, target = problem(gang, kind)
    found = []
    for layer in (head, linear):
        HOOKS[name](layer)
        inputs = x.clone().requires_grad_()
        loss = functional.cross_entropy(layer(inputs), target)
        loss.backward()
        found.append((loss, inputs.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_hooks_change_values_once(pool, size, kind, name):
    pool(size, compare_hooks, kind, name)


def compare_modes(gang, kind):
    head, linear, x, target = problem(gang, kind)
    for layer in (head, linear):
        with torch.no_grad():
            y = layer(x)
        assert not functional.cross_entropy(y, target).requires_grad
        y = layer(x)
        with torch.no_grad():
            loss = functional.cross_entropy(y, target)
        assert not loss.requires_grad
    head.weight.requires_grad_(False)
    y = head(x)
    head.weight.requires_grad_(True)
    with pytest.raises(DeferredLogitsError, match="or no longer frozen"):
        functional.cross_entropy(y, target)


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_are_recorded_as_in_the_call(pool, size, kind):
    pool(size, compare_modes, kind)


def compare_autocast(gang, kind):
    head, _, x, target = problem(gang, kind, torch.float32)
    expected = functional.cross_entropy(head(x), target)
    y = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.cross_entropy(y, target) == expected
        inside = functional.cross_entropy(head(x), target)
        y = head(x)
    assert functional.cross_entropy(y, target) == inside


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("size", [1, 2])
def test_products_have_the_dtype_of_the_call(pool, size, kind):
    pool(size, compare_autocast, kind)
