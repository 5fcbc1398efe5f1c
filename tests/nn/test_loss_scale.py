"""Scales of logits, with class weights and losses of each token, against torch on all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from loss_problems import V, capped, problem
from parity import SHARDED, whole
from tp_embed import FakeGang, OutputHead, VocabShardedEmbedding

WEIGHTS = torch.linspace(0.2, 1.7, V, dtype=torch.float64)
OPTIONS = [
    {"reduction": "none"},
    {"reduction": "none", "label_smoothing": 0.2},
    {"reduction": "sum", "weight": WEIGHTS},
    {"weight": WEIGHTS, "label_smoothing": 0.3},
    {"label_smoothing": 0.1},
]


def check_scales(gang, strategy):
    table, bias, x, target = problem(V)
    embed = SHARDED[strategy].from_embedding(table, gang)
    head = OutputHead(embed, bias=bias)
    for options in OPTIONS:
        for soft_cap in (None, 0.9):
            for scale in (0.125, -0.7, 30.0):
                logits = capped(functional.linear(x, table.weight, bias) * scale, soft_cap)
                expected = functional.cross_entropy(logits.view(-1, V), target.view(-1), **options)
                upstream = torch.linspace(0.5, 2.0, expected.numel(), dtype=torch.float64)
                upstream = upstream.view(expected.shape)
                wanted = torch.autograd.grad(expected, [x, bias, table.weight], upstream)
                found = head.loss(x, target, scale=scale, soft_cap=soft_cap, **options)
                torch.testing.assert_close(found.view(expected.shape), expected)
                grads = torch.autograd.grad(
                    found, [x, bias, embed.weight], upstream.view(found.shape)
                )
                grads = [*grads[:2], whole(embed, grads[2])]
                torch.testing.assert_close(grads, list(wanted))


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_scales_are_those_of_logits(pool, size, strategy):
    pool(size, check_scales, strategy)


def test_what_a_loss_of_each_token_does_not_take_names_the_fix():
    head = OutputHead(VocabShardedEmbedding(FakeGang("cpu"), V, 6))
    x, target = torch.randn(4, 6), torch.arange(4)
    with pytest.raises(ValueError, match=r"`scale` must not be 0 .* pass 1\.0"):
        head.loss(x, target, reduction="none", scale=0)
    # Each row of the gradient is computed once, so there is nothing to accumulate.
    found = head.loss(x, target, reduction="none", accum_dtype=torch.float32)
    assert torch.equal(found, head.loss(x, target, reduction="none"))
