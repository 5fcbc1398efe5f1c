"""Sharded or not, a table equals `torch.nn.Embedding` bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import SHARDED, Case, assert_same, reference, run, run_standard
from tp_embed import StandardEmbedding
from tp_embed.monitor import Traffic

SIZES = [1, 2, 3, 4]
KINDS = sorted(SHARDED)

CASES = {
    "even": Case(24, 12),
    "uneven": Case(23, 13),
    "fewer rows and columns than ranks": Case(3, 2),
    "one row, one column": Case(1, 1),
    "many duplicates": Case(5, 8, shape=(6, 50)),
    "empty batch": Case(11, 6, shape=(0, 4)),
    "0-d ids": Case(11, 6, shape=()),
    "1-d ids": Case(11, 6, shape=(7,)),
    "3-d ids": Case(11, 6, shape=(2, 3, 4)),
    "int32 ids": Case(11, 6, id_dtype=torch.int32),
    "uint8 ids": Case(11, 6, id_dtype=torch.uint8),
    "pad on the first rank": Case(11, 6, pad_idx=0),
    "pad on the second rank": Case(11, 6, pad_idx=4),
    "pad on the last rank": Case(11, 6, pad_idx=-1),
    "NaN row": Case(11, 6, nan_row=3, shape=(5, 5)),
    "float64": Case(11, 6, dtype=torch.float64),
    "sparse": Case(23, 13, sparse=True, shape=(4, 9)),
    "sparse with pad": Case(11, 6, sparse=True, pad_idx=2, shape=(4, 9)),
    "sparse empty batch": Case(11, 6, sparse=True, shape=(0,)),
}


def has_nan_only_in_its_row(seen, case):
    rows = seen.table.isnan().any(1).nonzero().flatten().tolist()
    assert rows == [case.nan_row]
    for (ids, _), output in zip(case.batches(), seen.outputs, strict=True):
        assert torch.equal(output.isnan().all(-1), ids == case.nan_row)


@pytest.mark.parametrize("name", CASES)
def test_standard_is_torch(name):
    assert_same(run_standard(CASES[name]), reference(CASES[name]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_sharded_is_torch(pool, name, kind, size):
    case = CASES[name]
    expected = reference(case)
    for seen in pool(size, run, kind, case):
        assert_same(seen, expected)
        if case.nan_row is not None:
            has_nan_only_in_its_row(seen, case)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("embed_dim", [12, 13, 2])
def test_shard_output_is_the_own_columns(pool, size, embed_dim):
    case = Case(11, embed_dim, pad_idx=3, output="shard")
    expected = reference(case)
    for rank, seen in enumerate(pool(size, run, "embed", case)):
        assert_same(seen, expected, part=case.part(rank, size))


EXCHANGES = {
    "even": Case(24, 12, shape=(2, 12)),
    "uneven": Case(23, 13, shape=(3, 7)),
    "many duplicates": Case(5, 8, shape=(6, 50)),
    "shorter than the gang": Case(11, 6, shape=(5, 2)),
    "fewer rows and columns than ranks": Case(3, 2, shape=(2, 8)),
    "empty batch": Case(11, 6, shape=(0, 4)),
    "one sequence": Case(40, 12, shape=(24,)),
    "pad": Case(11, 6, pad_idx=4, shape=(4, 9)),
    "sparse": Case(23, 13, sparse=True, shape=(4, 9)),
    "int32 ids, bf16": Case(23, 13, id_dtype=torch.int32, dtype=torch.bfloat16, shape=(6, 50)),
    "reused gradients": Case(23, 13, reuse_grad=True, pad_idx=1, shape=(4, 9)),
    "padding": Case(23, 13, shape=(4, 9), seq_lens=(9, 3, 1, 6)),
    "padding, sparse": Case(23, 13, shape=(2, 9), seq_lens=(2, 4), sparse=True, pad_idx=2),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("output", ["replicated", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXCHANGES)
def test_every_exchange_is_torch(pool, name, kind, output, size):
    for dedup in (True, False, "auto"):
        case = replace(EXCHANGES[name], output=output, dedup=dedup)
        low = case.dtype == torch.bfloat16
        expected = run_standard(replace(case, output="replicated")) if low else reference(case)
        for rank, seen in enumerate(pool(size, run, kind, case)):
            assert_same(seen, expected, part=case.part(rank, size))


def spread_ids(gang, dedup):
    """Gives all distinct ids but one to the first rank."""
    whole = StandardEmbedding(40, 8)
    embed = SHARDED["vocab"].from_embedding(whole, gang, dedup=dedup, check_ids=False)
    ids = torch.tensor([3, 1, 39, 0, 5, 4, 2, 3, 7, 6])
    with Traffic(gang) as traffic:
        output = embed(ids)
    assert torch.equal(output, whole(ids))
    return traffic.by_operation()


def test_rows_that_one_rank_owns_are_spread_over_the_gang(pool):
    sent = pool(4, spread_ids, True)
    assert all({"all_to_all", "all_gather"} == operations.keys() for operations in sent)
    row = 8 * 4
    # 9 distinct rows: the first rank sends 3, 3 and 0 to the others; then each gets 3.
    assert sent[0]["all_to_all"].bytes_sent == 5 * row
    assert sent[0]["all_gather"].bytes_sent == 3 * 3 * row


LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_the_same_for_every_gang(pool, kind, size, dtype):
    for case in (
        Case(23, 13, dtype=dtype, shape=(6, 50)),
        Case(11, 6, dtype=dtype, sparse=True, pad_idx=2, shape=(6, 50)),
        Case(3, 2, dtype=dtype),
    ):
        expected = run_standard(case)
        for seen in pool(size, run, kind, case):
            assert_same(seen, expected)


@given(
    dtype=st.sampled_from(LOW),
    rows=st.integers(1, 9),
    count=st.integers(0, 60),
    seed=st.integers(0, 2**31),
    sparse=st.booleans(),
)
def test_low_precision_gradient_is_never_further_from_fp64(dtype, rows, count, seed, sparse):
    case = Case(rows, 7, shape=(count,), dtype=dtype, seed=seed, steps=1, sparse=sparse)
    ours, torchs = run_standard(case), reference(case)
    assert torch.equal(ours.outputs[0], torchs.outputs[0])

    ids, grad = case.batches()[0]
    exact = torch.zeros(rows, 7, dtype=torch.float64).index_add_(0, ids, grad.double())
    magnitude = torch.zeros_like(exact).index_add_(0, ids, grad.double().abs())
    rounding = magnitude * torch.finfo(torch.float32).eps * max(count, 1)
    error = (ours.gradients[0].double() - exact).abs()
    assert (error <= (torchs.gradients[0].double() - exact).abs() + rounding).all()


def test_sparse_gradient_is_coalesced():
    embed = StandardEmbedding(10, 3, sparse=True)
    (grad,) = torch.autograd.grad(embed(torch.tensor([7, 1, 7])).sum(), embed.weight)
    assert grad.is_coalesced()
    assert grad.indices().tolist() == [[1, 7]]


@st.composite
def cases(draw):
    num_embeddings = draw(st.integers(1, 40))
    return Case(
        num_embeddings,
        draw(st.integers(1, 20)),
        shape=tuple(draw(st.lists(st.integers(0, 6), max_size=3))),
        pad_idx=draw(st.none() | st.integers(-num_embeddings, num_embeddings - 1)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        id_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        sparse=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        dedup=draw(st.sampled_from(["auto", True, False])),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_any_table_over_any_gang_is_torch(pool, kind):
    @settings(max_examples=150)
    @given(case=cases(), size=st.sampled_from(SIZES))
    def check(case, size):
        expected = reference(case)
        for seen in pool(size, run, kind, case):
            assert_same(seen, expected)

    check()
