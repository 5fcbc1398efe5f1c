"""Losses of 16-bit tensors and under autocast are as accurate as in torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from loss_problems import E, expected_loss, problem
from parity import whole
from tp_embed import FakeGang, OutputHead, Partition, ShardedEmbedding, StandardEmbedding
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.nn import fused_loss, projection
from tp_embed.nn.loss import cross_entropy, linear_cross_entropy


def low_precision(gang, kind, dtype, scale, widened, options, min_tokens):
    """The distance of the gradients from fp64, by each way, and the distance of torch's:
    all at once, and by their norm, which rounding errors of single items do not change."""
    set_products(widened)
    fused_loss._MIN_TOKENS = min_tokens
    table, _, x, target = problem(257)
    logits = functional.linear(x, table.weight)
    expected_loss(logits.flatten(0, -2), target.flatten(), **options).backward()
    exact = x.grad, table.weight.grad

    def errors(x_grad, table_grad):
        found = [g.double() / scale for g in (x_grad, table_grad)]
        apart = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
        norms = [abs(float(f.norm() / e.norm()) - 1) for f, e in zip(found, exact, strict=True)]
        return apart + norms

    low = [t.detach().to(dtype).requires_grad_() for t in (x, table.weight)]
    logits = functional.linear(*low).float()
    loss = expected_loss(logits.flatten(0, -2), target.flatten(), **options)
    (loss * scale).backward()
    results = [errors(low[0].grad, low[1].grad)]

    table_low = StandardEmbedding(257, E, dtype=dtype)
    table_low.weight.data.copy_(table.weight)
    embed = kind.from_embedding(table_low, gang)
    head = OutputHead(embed)
    ways = [
        lambda x, target: head.loss(x, target, **options),
        lambda x, target: head.loss(x, target, accum_dtype=torch.float32, **options),
    ]
    if kind is VocabSharded:
        local = OutputHead(embed, output="shard")
        ways.append(
            lambda x, target: cross_entropy(local(x), target, gang, embed.partition, **options)
        )
    for way in ways:
        embed.weight.grad = None
        low_x = x.detach().to(dtype).requires_grad_()
        (way(low_x, target) * scale).backward()
        results.append(errors(low_x.grad, whole(embed, embed.weight.grad)))
    return results


def set_products(widened):
    """Whether this CPU is taken for one that multiplies low precisions in fp32."""
    there = next(name for name, able in torch.cpu.get_capabilities().items() if able is True)
    names = () if widened else (there,)
    projection._CPU_PRODUCTS = {torch.bfloat16: names, torch.float16: names}


@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0, "z_loss": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 1 / 7),  # As with seven micro-batches; bf16 would round it by 0.2%.
        (torch.float16, 2.0**12),
        (torch.float16, 2.0**16),  # DeepSpeed's first loss scale, which fp16 does not hold.
    ],
)
@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_low_precision_gradients_are_as_good_as_those_of_torch(pool, kind, dtype, scale, options):
    # With logits that are computed again for some tokens, or for all.
    for widened, min_tokens in [(False, 1), (False, 64), (True, 1), (True, 64)]:
        arguments = kind, dtype, scale, widened, options, min_tokens
        theirs, *ours = pool(2, low_precision, *arguments)[0]
        for errors in ours:
            for our, their, slack in zip(errors, theirs, (1e-3, 1e-3, 1.5e-3, 1.5e-3), strict=True):
                assert our < 1.5 * their + slack


def errors_of_tokens(gang, kind, dtype, options):
    """The largest error of a token's loss, by each way that computes logits."""
    torch.manual_seed(5)
    table, tokens = StandardEmbedding(509, 256, dtype=dtype), 24
    table.weight.data.normal_(std=0.3)
    x = torch.randn(tokens, 256).to(dtype)
    bias = torch.nn.Parameter(torch.randn(509).to(dtype))
    logits = functional.linear(x.double(), table.weight.double(), bias.double())
    target = logits.topk(5).indices[:, 2]  # Likely ones.
    head = OutputHead(kind.from_embedding(table, gang), bias=bias)

    def transformed(x, target):
        return torch.func.grad_and_value(lambda x: head.loss(x, target, **options))(x)[1]

    largest = []
    for widened in (False, True):
        set_products(widened)
        for way in (lambda x, target: head.loss(x, target, **options), transformed):
            exact = [
                expected_loss(logits[i, None], target[i, None], **options) for i in range(tokens)
            ]
            found = [way(x[i, None], target[i, None]).detach().double() for i in range(tokens)]
            largest.append((torch.stack(found) - torch.stack(exact)).abs().max().item())
    return largest


@pytest.mark.parametrize("options", [{}, {"soft_cap": 9.0, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_logits_are_not_rounded(pool, size, kind, dtype, options):
    for found in pool(size, errors_of_tokens, kind, dtype, options):
        assert max(found) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_inputs_and_not_logits(monkeypatch, dtype):
    monkeypatch.setattr(projection, "_CPU_PRODUCTS", projection._CPU_PRODUCTS)
    set_products(widened=False)
    x, weight = torch.randn(24, 256, dtype=dtype), torch.randn(509, 256) * 0.3
    logits = functional.linear(x.bfloat16().double(), weight.bfloat16().double())
    target = logits.topk(5).indices[:, 2]
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, weight, target, FakeGang("cpu"), Partition(509, 1))
    assert abs(found.item() - functional.cross_entropy(logits, target).item()) < 1e-5


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_under_autocast(monkeypatch, widened, dtype):
    """Hidden states of any dtype, as another layer gives them, and a weight in fp32."""
    monkeypatch.setattr(projection, "_CPU_PRODUCTS", projection._CPU_PRODUCTS)
    set_products(widened)
    table, bias, x, target = problem(257, torch.float32)
    x, weight = x.detach().flatten(0, 1).to(dtype).requires_grad_(), table.weight
    target = target.flatten()
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.cross_entropy(functional.linear(x, weight, bias).float(), target)
    inputs = [x, weight, bias]
    gradients = torch.autograd.grad(expected, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(
            x, weight, target, FakeGang("cpu"), Partition(257, 1), bias=bias
        )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, inputs), gradients, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
