"""Gradient norms, and clipping by them, are the same as without sharding."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import tp_embed
from parity import assert_same_bits
from tp_embed import FakeGang, VocabShardedEmbedding, shard_embeddings

V, E = 11, 6
ORDERS = [2.0, 1.0, 0.5, 3.7, 0.0, float("inf"), float("-inf"), -1.0]


class Model(nn.Module):
    """Has a table, and one with fewer rows than ranks; optionally ties the head to the first."""

    def __init__(self, tied, sparse=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, E, sparse=sparse, dtype=dtype)
        self.types = nn.Embedding(2, E, sparse=sparse, dtype=dtype)
        self.norm = nn.LayerNorm(E, dtype=dtype)
        self.head = nn.Linear(E, V, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids) + self.types(ids % 2)).tanh())


def batch(step):
    return torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(step))


def backward(model, step=0, scale=1.0):
    ids = batch(step)
    logits = model(ids[:, :-1]).float().flatten(0, 1)
    loss = cross_entropy(logits, ids[:, 1:].flatten())
    (loss * scale).backward()
    return loss.item()


def models(gang, strategy, tied=False, sparse=False, dtype=torch.float32):
    """Builds the model of one process, with dense gradients, and the sharded model."""
    sharded = Model(tied, sparse, dtype)
    shard_embeddings(sharded, gang, strategy=strategy)
    return Model(tied, dtype=dtype), sharded


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_close(seen, expected):
    assert (seen.shape, seen.dtype, seen.device) == ((), expected.dtype, expected.device)
    torch.testing.assert_close(seen, expected, rtol=4e-7, atol=0, equal_nan=True)


def assert_same_on_all_ranks(gang, tensor):
    of_ranks = tensor.new_empty(gang.size, *tensor.shape)
    gang.all_gather(of_ranks, tensor.detach().contiguous())
    for other in of_ranks:
        assert_same_bits(tensor.detach(), other, "ranks")


def take_gradients(expected, model):
    """Copies the gradients of the sharded model to the model of one process."""
    for whole, parameter in zip(expected.parameters(), model.parameters(), strict=True):
        grad = parameter.grad.to_dense()
        whole.grad = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()


def clips_as_whole(gang, strategy, tied, sparse):
    expected, model = models(gang, strategy, tied, sparse)
    for foreach in (None, True, False):
        for order in ORDERS:
            model.zero_grad()
            backward(model)
            take_gradients(expected, model)
            total = tp_embed.get_total_norm(gradients(model), order, foreach=foreach)
            whole = nn.utils.clip_grad_norm_(expected.parameters(), 0.1, order)
            norm = tp_embed.clip_grad_norm_(model.parameters(), 0.1, order, foreach=foreach)
            assert_close(norm, whole)
            assert_same_bits(total, norm, "both functions")
            assert_same_on_all_ranks(gang, norm)
            before = [p.grad for p in expected.parameters()]
            take_gradients(expected, model)
            for clipped, parameter in zip(before, expected.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, clipped, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize(("tied", "sparse"), [(False, False), (True, False), (False, True)])
def test_clipping(pool, strategy, tied, sparse):
    for size in (1, 2, 3):
        pool(size, clips_as_whole, strategy, tied, sparse)


def in_other_precision(gang, strategy, dtype):
    expected, model = models(gang, strategy, dtype=dtype)
    backward(model)
    take_gradients(expected, model)
    for order in (2.0, 1.0, float("inf")):
        whole = nn.utils.get_total_norm(gradients(expected), order)
        norm = tp_embed.get_total_norm(gradients(model), order)
        assert norm.dtype == whole.dtype == dtype
        torch.testing.assert_close(norm, whole, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_and_high_precision(pool, dtype):
    for strategy in ("embed", "vocab"):
        pool(3, in_other_precision, strategy, dtype)


def trains_as_whole(gang, strategy, tied):
    expected, model = models(gang, strategy, tied)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (expected, model)]
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert backward(model, step) == pytest.approx(backward(expected, step), rel=1e-5)
        nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
        tp_embed.clip_grad_norm_(model.parameters(), 0.05)
        for optimizer in optimizers:
            optimizer.step()
    for parameter in (model.norm.weight, model.norm.bias):
        assert_same_on_all_ranks(gang, parameter)
    torch.testing.assert_close(model.norm.weight, expected.norm.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.embed.to_embedding().weight, expected.embed.weight, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_training(pool, strategy, tied):
    for size in (1, 2, 3):
        pool(size, trains_as_whole, strategy, tied)


def over_several_gangs(world):
    """Shards one table over two ranks and one over four, and averages gradients over the two
    replicas of the former."""
    pairs = [world.create_gang([0, 1]), world.create_gang([2, 3])]
    others = [world.create_gang([0, 2]), world.create_gang([1, 3])]
    narrow = next(gang for gang in pairs if gang)
    replicas = next(gang for gang in others if gang)
    expected, model = Model(tied=False), Model(tied=False)
    shard_embeddings(model, narrow, strategy="vocab", rules={"types": "none"})
    shard_embeddings(model, world, strategy="embed")
    backward(expected)
    backward(model)
    for parameter in (p for p in model.parameters() if p is not model.types.weight):
        # The same batch on both: the mean changes nothing.
        replicas.all_reduce(parameter.grad)
        parameter.grad.div_(2)
    calls = []
    for gang in (narrow, world, replicas):
        gang.register_collective_hook(lambda name, tensors, g=gang: _count(calls, g, name))
    norm = tp_embed.clip_grad_norm_(model.parameters(), 0.1)
    assert calls == [(narrow, "all_gather"), (world, "all_gather")]
    assert_close(norm, nn.utils.clip_grad_norm_(expected.parameters(), 0.1))
    assert_same_on_all_ranks(world, norm)


def _count(calls, gang, name):
    calls.append((gang, name))
    return warnings.catch_warnings()  # The batch.


def test_gangs_of_several_sizes_in_data_parallelism(pool):
    pool(4, over_several_gangs)


def without_gradients(gang):
    """Frozen tables, unused tables, and a table with a gradient on one rank only."""
    expected, model = models(gang, "vocab")
    for m in (expected, model):
        m.types.weight.requires_grad_(False)
        backward(m)
    assert_close(
        tp_embed.clip_grad_norm_(model.parameters(), 0.1),
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1),
    )
    for p in (model.embed.weight, expected.embed.weight):
        p.grad = None
    assert_close(
        tp_embed.clip_grad_norm_(model.parameters(), 0.1),
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1),
    )
    if gang.rank == 0:
        model.embed.weight.grad = torch.ones(len(model.embed.rows), E)
    norm = tp_embed.clip_grad_norm_(model.embed.parameters(), 1.0)
    assert_close(norm, torch.tensor(float(len(range(-(-V // gang.size))) * E)).sqrt())


def test_without_gradients(pool):
    for size in (2, 3):
        pool(size, without_gradients)


def not_finite(gang, value):
    for strategy in ("embed", "vocab"):
        _, model = models(gang, strategy)
        backward(model)
        if gang.rank == gang.size - 1:
            model.embed.weight.grad.to_local()[0, 0] = value
        before = model.norm.weight.grad.clone()
        with pytest.raises(RuntimeError, match=r"The total norm of order 2\.0 .* is non-finite"):
            tp_embed.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
        assert_same_bits(model.norm.weight.grad, before, "gradients")
        norm = tp_embed.clip_grad_norm_(model.parameters(), 0.1)
        assert not norm.isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_on_one_rank(pool, value):
    pool(2, not_finite, value)


def test_arguments_are_those_of_torch():
    embed = VocabShardedEmbedding(FakeGang("cpu", rank=1, size=4), 8, 2)
    embed(torch.tensor([2, 3])).sum().backward()  # The rows, and as many on each of four ranks.
    assert tp_embed.clip_grad_norm_(embed.weight, 1.0) == 4
    torch.testing.assert_close(
        embed.weight.grad.detach(), torch.full((2, 2), 0.25), rtol=1e-6, atol=0
    )
    assert tp_embed.get_total_norm(embed.weight.grad) == pytest.approx(1.0)
    assert tp_embed.get_total_norm(torch.full((4,), 2.0), norm_type=1) == 8
    assert tp_embed.clip_grad_norm_([], 1.0) == 0
    assert tp_embed.get_total_norm([]) == 0
    with pytest.warns(UserWarning, match="`parameters` is an empty generator"):
        tp_embed.clip_grad_norm_((p for p in ()), 1.0)
    layer = nn.Linear(2, 2)
    layer(torch.ones(2)).sum().backward()
    expected = nn.utils.get_total_norm([p.grad for p in layer.parameters()])
    assert tp_embed.clip_grad_norm_((p for p in layer.parameters()), "0.5") == expected
