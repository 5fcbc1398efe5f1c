"""Compares row optimizers with plain dense tensors of torch, at P = 1, 2 and 3."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from tp_embed import ShardedEmbedding, StandardEmbedding, VocabShardedEmbedding
from tp_embed.optim import LazyAdam, RowwiseAdagrad, RowwiseAdam

V, E, PAD, STEPS, LR, DECAY = 29, 10, 4, 6, 0.1, 0.3
KINDS = {"rowwise_adagrad": RowwiseAdagrad, "rowwise_adam": RowwiseAdam, "lazy_adam": LazyAdam}
SHARDED = {"embed": ShardedEmbedding, "vocab": VocabShardedEmbedding}


def whole_table(**options):
    torch.manual_seed(0)
    return StandardEmbedding(V, E, PAD, sparse=True, **options)


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(V, (2, 4), generator=generator)
        ids[0, 0], ids[1, 1] = ids[0, 1], PAD  # A repeated id, and padding.
        yield ids, torch.randn(2, 4, E, generator=generator)


def schedule(step):
    return 1.0 / (1 + step)


def train(embed, kind, decay):
    optimizer = KINDS[kind]([embed.weight], lr=LR, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for ids, grad in batches():
        optimizer.zero_grad()
        embed(ids).backward(grad)
        assert embed.weight.grad.is_sparse
        optimizer.step()
        scheduler.step()
    return optimizer


class Dense:
    """The same formulas on dense tensors, row by row and in fp64, with a loop over missed steps."""

    def __init__(self, table, kind, decay):
        self.table, self.kind, self.decay = table.double(), kind, decay
        self.mean = torch.zeros(V, E, dtype=torch.float64)
        self.square = torch.zeros(V, E, dtype=torch.float64)
        self.factors, self.missed = [], [0] * V

    def step(self, grad, used, lr):
        self.factors.append(1 - lr * self.decay)
        t = len(self.factors)
        for row in used:
            self.table[row] *= math.prod(self.factors[self.missed[row] :])
            self.missed[row] = t
            g = grad[row].double()
            square = g * g if self.kind == "lazy_adam" else (g * g).mean()
            if self.kind == "rowwise_adagrad":
                self.square[row] += square
                self.table[row] -= lr * g / (self.square[row].sqrt() + 1e-10)
                continue
            self.mean[row] = 0.9 * self.mean[row] + 0.1 * g
            self.square[row] = 0.999 * self.square[row] + 0.001 * square
            denominator = (self.square[row] / (1 - 0.999**t)).sqrt() + 1e-8
            self.table[row] -= lr * self.mean[row] / (1 - 0.9**t) / denominator


def expected(kind, decay):
    """What plain torch gives: gradients of `torch.nn.Embedding`, and the formulas."""
    plain = nn.Embedding(V, E, padding_idx=PAD)
    with torch.no_grad():
        plain.weight.copy_(whole_table().weight)
    dense = Dense(plain.weight.detach(), kind, decay)
    for step, (ids, grad) in enumerate(batches()):
        plain.zero_grad()
        plain(ids).backward(grad)
        used = sorted(set(ids.flatten().tolist()) - {PAD})
        dense.step(plain.weight.grad, used, LR * schedule(step))
    return dense.table.float()


def trained(gang, name, kind, decay):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # The optimizers are known to train shards.
        embed = SHARDED[name].from_embedding(whole_table(), gang)
        train(embed, kind, decay)
    return embed.to_embedding().weight.detach()


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_trains_as_on_dense_tensors_in_one_process(pool, size, name, kind, decay):
    standard = whole_table()
    train(standard, kind, decay)
    for table in pool(size, trained, name, kind, decay):
        torch.testing.assert_close(table, expected(kind, decay), rtol=1e-5, atol=1e-6)
        # The mean of squares is summed in fp64, so that it is rounded alike at any P.
        assert torch.equal(table, standard.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_tables_of_torch(kind):
    plain, standard = nn.Embedding(V, E, padding_idx=PAD, sparse=True), whole_table()
    with torch.no_grad():
        plain.weight.copy_(standard.weight)
    train(plain, kind, DECAY)
    train(standard, kind, DECAY)
    assert torch.equal(plain.weight, standard.weight)


def empty_shards(gang, name, kind):
    torch.manual_seed(0)
    embed = SHARDED[name].from_embedding(StandardEmbedding(2, 2, sparse=True), gang)
    optimizer = KINDS[kind]([embed.weight], lr=LR, weight_decay=DECAY)
    for _ in range(2):
        optimizer.zero_grad()
        embed(torch.tensor([1, 1])).sum().backward()
        optimizer.step()
    return embed.to_embedding().weight.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHARDED)
def test_ranks_without_rows_or_columns(pool, name, kind):
    (alone,) = pool(1, empty_shards, name, kind)
    for table in pool(3, empty_shards, name, kind):
        assert torch.equal(table, alone)


def test_lazy_adam_is_adam_where_all_rows_are_used():
    lazy, dense = whole_table(), nn.Embedding(V, E, padding_idx=PAD)
    with torch.no_grad():
        dense.weight.copy_(lazy.weight)
    options = {"lr": LR, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = (
        LazyAdam([lazy.weight], **options),
        torch.optim.AdamW([dense.weight], weight_decay=0.0, **options),
    )
    ids = torch.arange(V)[torch.arange(V) != PAD].repeat(2)
    for _ in range(STEPS):
        grad = torch.randn(len(ids), E)
        for embed, optimizer in zip((lazy, dense), optimizers, strict=True):
            optimizer.zero_grad()
            embed(ids).backward(grad)
            optimizer.step()
    assert torch.equal(lazy.weight, dense.weight)


def test_lazy_adam_is_sparse_adam_without_eps():
    lazy, sparse = whole_table(), whole_table()
    optimizers = (
        LazyAdam([lazy.weight], lr=LR, eps=1e-30),
        torch.optim.SparseAdam([sparse.weight], lr=LR, eps=1e-30),
    )
    for ids, grad in batches():
        for embed, optimizer in zip((lazy, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            embed(ids).backward(grad)
            optimizer.step()
    torch.testing.assert_close(lazy.weight, sparse.weight, rtol=1e-6, atol=1e-6)


def test_decay_all_is_the_decay_of_each_step():
    """Of Adagrad with dense gradients that are zero in other rows, and decoupled weight decay."""
    embed = whole_table()
    table, sums = embed.weight.detach().clone(), torch.zeros(V, 1)
    optimizer = train(embed, "rowwise_adagrad", DECAY)
    dense = nn.Embedding(V, E, padding_idx=PAD)
    for step, (ids, grad) in enumerate(batches()):
        dense.zero_grad()
        dense(ids).backward(grad)
        g, lr = dense.weight.grad, LR * schedule(step)
        sums += g.square().mean(1, keepdim=True)
        table.mul_(1 - lr * DECAY).sub_(lr * g / (sums.sqrt() + 1e-10))
    assert not torch.allclose(embed.weight, table)
    optimizer.decay_all()
    torch.testing.assert_close(embed.weight.detach(), table, rtol=1e-5, atol=1e-6)
    optimizer.decay_all()
    torch.testing.assert_close(embed.weight.detach(), table, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_other_rows_alone(kind):
    embed = whole_table()
    before = embed.weight.detach().clone()
    optimizer = KINDS[kind]([embed.weight], weight_decay=DECAY)
    embed(torch.tensor([3, 5, 3])).sum().backward()
    optimizer.step()
    is_other = torch.ones(V, dtype=torch.bool)
    is_other[[3, 5]] = False
    assert torch.equal(embed.weight[is_other], before[is_other])
    for state in optimizer.state[embed.weight].values():
        if isinstance(state, torch.Tensor):
            assert not state[is_other].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_micro_batches_are_summed(kind):
    split, whole = whole_table(), whole_table()
    for embed, parts in ((split, 2), (whole, 1)):
        optimizer = KINDS[kind]([embed.weight], lr=LR)
        for ids, grad in batches():
            optimizer.zero_grad()
            for some, grads in zip(ids.chunk(parts), grad.chunk(parts), strict=True):
                embed(some).backward(grads)
            optimizer.step()
    torch.testing.assert_close(split.weight, whole.weight, rtol=1e-5, atol=1e-6)


def test_skips_parameters_without_a_gradient():
    embed = whole_table()
    optimizer = RowwiseAdam([embed.weight], weight_decay=DECAY)
    before = embed.weight.detach().clone()
    optimizer.step()
    assert not optimizer.state[embed.weight] or "step" not in optimizer.state[embed.weight]
    assert torch.equal(embed.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"`lr` must be at least 0, but is -1\.0"),
        ({"eps": -1.0}, "`eps` must be at least 0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]` must be in \[0, 1\), but is 1\.0"),
    ],
)
def test_refuses_hyperparameters(options, message):
    with pytest.raises(ValueError, match=message):
        LazyAdam([nn.Parameter(torch.zeros(3, 2))], **options)


def test_refuses_other_parameters_and_gradients():
    with pytest.raises(ValueError, match=r"tables of the shape \(V, E\), but hold .* \(3,\)"):
        RowwiseAdagrad([nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match="one of the dtypes"):
        RowwiseAdagrad([nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))])
    weight = nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"must be row-sparse.*Make the table with `sparse=True`"):
        RowwiseAdagrad([weight]).step()
    embed = whole_table()
    embed(torch.tensor([3])).sum().backward()
    with pytest.raises(ValueError, match=r"`lr \* weight_decay` must be less than 1, but is 2"):
        RowwiseAdagrad([embed.weight], lr=2.0, weight_decay=1.0).step()
