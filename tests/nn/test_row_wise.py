"""Compares `RowWiseEmbedding`, whose ranks have ids of their own, with `torch.nn.Embedding` in one
process that looks up the ids of all ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity import assert_same_bits as same_bits
from tp_embed import BatchLayout, FakeGang, OutputHead, RowWiseEmbedding, StandardEmbedding
from tp_embed.parameter.sharded import local

SIZES = [(24, 8), (11, 7), (3, 2)]


def assert_same_bits(found, expected):
    same_bits(found, expected, "values")


CUTS = [("block", True), ("block", False), ("cyclic", True), ("cyclic", False)]


@dataclass(frozen=True)
class Case:
    """A table, and ids of each rank: random ones on rank 0, none on rank 1, one id many times on
    rank 2, and a few, in another shape, on rank 3."""

    sizes: tuple[int, int] = (24, 8)
    placement: str = "block"
    dedup: Any = "auto"
    sparse: bool = False
    pad_idx: int | None = None
    grad_reduction: str = "sum"
    dtype: torch.dtype = torch.float32
    lacking: int = 1  # The rank without ids.

    def table(self) -> StandardEmbedding:
        generator = torch.Generator().manual_seed(1)
        embed = StandardEmbedding(*self.sizes, self.pad_idx, dtype=self.dtype, sparse=self.sparse)
        with torch.no_grad():
            embed.weight.copy_(torch.randn(self.sizes, generator=generator))
        return embed

    def cut(self, gang) -> RowWiseEmbedding:
        options = {
            "placement": self.placement,
            "grad_reduction": self.grad_reduction,
            "dedup": self.dedup,
        }
        return RowWiseEmbedding.from_embedding(self.table(), gang, **options)

    def batch(self, rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
        """Returns the ids of a rank, and the gradient of its output."""
        (v, e), generator = self.sizes, torch.Generator().manual_seed(10 * step + rank)
        shape = [(3, 4), (2, 3), (9,), ()][rank]
        ids = torch.randint(v, shape, generator=generator)
        if rank == self.lacking:
            ids = ids.new_empty(0, *shape[1:])
        if rank == 2:
            ids = torch.full(shape, v - 1)
        return ids, torch.randn(*ids.shape, e, generator=generator).to(self.dtype)


def alone(case, size, optimizer=None, steps=1, kind=nn.Embedding):
    """The same by plain torch, in one process with the ids of all ranks."""
    table = case.table()
    embed = nn.Embedding(
        *case.sizes,
        padding_idx=table.pad_idx,
        _weight=table.weight.detach(),
        sparse=case.sparse,
    )
    made = optimizer and optimizer(embed.parameters())
    outputs: list[Tensor] = []
    for step in range(steps):
        batches = [case.batch(rank, step) for rank in range(size)]
        embed.weight.grad = None
        whole = embed(torch.cat([ids.flatten() for ids, _ in batches]))
        share = size if case.grad_reduction == "mean" else 1
        whole.backward(torch.cat([grad.reshape(-1, case.sizes[1]) for _, grad in batches]) / share)
        parts = whole.detach().split([ids.numel() for ids, _ in batches])
        outputs = [
            p.view(*ids.shape, case.sizes[1]) for p, (ids, _) in zip(parts, batches, strict=True)
        ]
        if made:
            made.step()
    return outputs, embed.weight.grad, embed.weight.detach()


def trained(gang, case, optimizer=None, steps=1):
    embed = case.cut(gang)
    made = optimizer and optimizer(embed.parameters())
    for step in range(steps):
        embed.weight.grad = None
        ids, grad = case.batch(gang.rank, step)
        output = embed(ids)
        output.backward(grad)
        if made:
            made.step()
    grad = local(embed.weight.grad)
    assert grad.is_sparse == case.sparse
    assert not case.sparse or grad.is_coalesced()
    return output.detach(), grad.to_dense(), list(embed.rows), embed.to_embedding().weight.detach()


def trained_all(gang, cases):
    return [trained(gang, case) for case in cases]


def joined(results, case):
    whole = torch.full(case.sizes, torch.nan, dtype=case.dtype)
    for _, grad, rows, _ in results:
        whole[rows] = grad
    return whole


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_outputs_and_gradients(pool, size, sizes):
    cases = [
        Case(sizes, placement, dedup, sparse, pad_idx, lacking=lacking)
        for (placement, dedup), (sparse, pad_idx, lacking) in itertools.product(
            CUTS, [(False, None, 1), (True, 0, 0), (False, -1, 3)]
        )
    ]
    for case, results in zip(cases, zip(*pool(size, trained_all, cases), strict=True), strict=True):
        outputs, grad, _ = alone(case, size)
        for (output, *_), expected in zip(results, outputs, strict=True):
            assert_same_bits(output, expected)
        if case.dedup:
            found = joined(results, case)
            torch.testing.assert_close(found, grad.to_dense(), atol=1e-6, rtol=0)
        else:
            assert_same_bits(joined(results, case), grad.to_dense())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def sparse_adam(parameters):
    return torch.optim.SparseAdam(list(parameters), lr=0.01)


@pytest.mark.parametrize("placement", ["block", "cyclic"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_hundred_steps(pool, size, placement):
    makers = [(sgd, True), (sgd, False), (adam, True), (adam, False), (sparse_adam, True)]
    for optimizer, dedup in makers:
        case = Case((11, 7), placement, dedup, optimizer is sparse_adam, pad_idx=2)
        _, _, table = alone(case, size, optimizer, steps=100)
        for *_, found in pool(size, trained, case, optimizer, steps=100):
            if dedup:
                torch.testing.assert_close(found, table, atol=2e-5, rtol=0)
            else:
                assert_same_bits(found, table)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dedup", [True, False])
def test_mean_over_ranks(pool, size, dedup):
    case = Case(placement="cyclic", dedup=dedup, grad_reduction="mean")
    _, grad, _ = alone(case, size)
    torch.testing.assert_close(joined(pool(size, trained, case), case), grad, atol=1e-6, rtol=0)


def trained_in_pairs(gang, case):
    """Ranks 0 and 1 have one batch, ranks 2 and 3 the other, as with TP 2 x DP 2."""
    embed = case.cut(gang)
    ids, grad = case.batch(2 * (gang.rank // 2))
    embed(ids).backward(grad)
    return None, local(embed.weight.grad), list(embed.rows), None


@pytest.mark.parametrize("placement", ["block", "cyclic"])
def test_tensor_parallel_ranks_with_one_batch_count_once(pool, placement):
    case = Case(placement=placement, grad_reduction="mean")
    embed = nn.Embedding(*case.sizes, _weight=case.table().weight.detach())
    for rank in (0, 2):
        ids, grad = case.batch(rank)
        embed(ids).backward(grad / 2)
    found = joined(pool(4, trained_in_pairs, case), case)
    torch.testing.assert_close(found, embed.weight.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(pool, dtype):
    for dedup in (True, False):
        case = Case((11, 7), "cyclic", dedup, dtype=dtype)
        outputs, _, _ = alone(case, 3)
        _, grad, _ = alone(replace(case, dtype=torch.float64), 3)
        results = pool(3, trained, case)
        for (output, *_), expected in zip(results, outputs, strict=True):
            assert_same_bits(output, expected)
        found = joined(results, case).double()
        scale = grad.abs().max() * torch.finfo(dtype).eps * 2
        assert (found - grad).abs().max() <= scale


def counts_of(gang, placement):
    """Returns how many rows a rank sends if all ranks look up the first hundred of a thousand."""
    embed = RowWiseEmbedding(gang, 1000, 2, placement=placement)
    sizes = []
    all_to_all = gang.all_to_all
    try:
        gang.all_to_all = lambda *args: (sizes.append(len(args[1])), all_to_all(*args))
        embed(torch.arange(100))
    finally:
        del gang.all_to_all
    return sizes[-1]


def test_cyclic_rows_spread_frequent_neighbours(pool):
    assert pool(4, counts_of, "block") == [400, 0, 0, 0]
    assert pool(4, counts_of, "cyclic") == [100, 100, 100, 100]


def with_padding(gang, case):
    """Padded positions aren't read, also where only one rank has some."""
    embed = case.cut(gang)
    ids = torch.tensor([[1, 2, 3], [4, -7, 99]])
    layout = BatchLayout.of(ids, [3, 1])
    if gang.rank == 1:
        ids, layout = ids[:1], None
    output = embed(ids, layout)
    output.sum().backward()
    return output.detach(), local(embed.weight.grad), list(embed.rows), None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_padding(pool, size):
    case = Case(placement="cyclic")
    results = pool(size, with_padding, case)
    table = case.table().weight.detach()
    for rank, (output, *_) in enumerate(results):
        expected = table[[1, 2, 3]] if rank == 1 else table[[1, 2, 3, 4, 0, 0]].view(2, 3, -1)
        if rank != 1:
            expected[1, 1:] = 0
        assert_same_bits(output, expected.view(output.shape))
    grad = joined(results, case)
    assert grad[[1, 2, 3, 4], 0].tolist() == [size, size, size, size - (size > 1)]
    assert not grad[5:].any()


def with_options(gang, placement):
    table = StandardEmbedding(11, 4, scale=3.0, train_rows=[0, 2, 7, 10], reuse_grad=True)
    embed = RowWiseEmbedding.from_embedding(table, gang, placement=placement)
    found = []
    for ids in (torch.arange(11), torch.tensor([2, 3])):
        embed.weight.grad = None
        output = embed(ids.to(torch.int32))
        output.sum().backward()
        found.append(local(embed.weight.grad).clone())
        torch.testing.assert_close(output, 3.0 * table.weight[ids.long()])
    return found, list(embed.rows)


@pytest.mark.parametrize("placement", ["block", "cyclic"])
def test_scale_and_rows_that_train(pool, placement):
    for found, rows in pool(3, with_options, placement):
        for grad, trains in zip(found, ([0, 2, 7, 10], [2]), strict=True):
            expected = torch.zeros(11, 4)
            expected[trains] = 9.0
            assert_same_bits(grad, expected[rows])


def second_derivative(gang, reduction):
    embed = RowWiseEmbedding(gang, 6, 3, pad_idx=1, grad_reduction=reduction, dtype=torch.float64)
    ids = torch.tensor([0, 1, 5, 5])[: gang.rank + 2]
    weight = embed.weight
    (grad,) = torch.autograd.grad(embed(ids).pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), weight)
    return local(second), list(embed.rows), embed.to_embedding().weight.detach()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_derivatives_of_gradients(pool, reduction):
    results = pool(3, second_derivative, reduction)
    weight = results[0][2].requires_grad_()
    losses = [
        nn.functional.embedding(torch.tensor([0, 1, 5, 5])[: n + 2], weight, 1).pow(3).sum()
        for n in range(3)
    ]
    share = 3 if reduction == "mean" else 1
    (grad,) = torch.autograd.grad(sum(losses) / share, weight, create_graph=True)
    # Each rank squares its own shard.
    (second,) = torch.autograd.grad(grad.pow(2).sum() / share, weight)
    for found, rows, _ in results:
        torch.testing.assert_close(found, second[rows])


def test_refused_options():
    gang = FakeGang("cpu")
    with pytest.raises(ValueError, match="`placement` must be one of"):
        RowWiseEmbedding(gang, 4, 2, placement="blocks")
    with pytest.raises(ValueError, match="`grad_reduction` must be one of"):
        RowWiseEmbedding(gang, 4, 2, grad_reduction="average")
    with pytest.raises(TypeError, match="`embed` must be a `ShardedEmbedding` or"):
        OutputHead(RowWiseEmbedding(gang, 4, 2))
    with pytest.raises(ValueError, match="`RowWiseEmbedding` gives each rank the rows of its own"):
        StandardEmbedding(4, 2).output = "own"
    embed = RowWiseEmbedding(FakeGang("cpu", rank=1, size=3), 11, 6, 0, placement="cyclic")
    assert repr(embed) == (
        "RowWiseEmbedding(11, 6, pad_idx=0, rows=1:11:3, shard=1/3, dtype=torch.float32, "
        "device='cpu')"
    )
