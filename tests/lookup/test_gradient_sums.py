"""Sums of gradients: with any strides, and on accelerators within CUDA's buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from emulated import check_kernel
from parity import SHARDED, assert_same_bits
from tp_embed import FakeGang, Partition, StandardEmbedding
from tp_embed.lookup.gradient import rows_to_sum, sum_all

V, N = 20, 40

LAYOUTS = {
    "transposed": lambda grad: grad.t().contiguous().t(),
    "every second column": lambda grad: grad.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda grad: grad.repeat_interleave(2, 0)[::2],
    "a slice": lambda grad: torch.cat([grad, grad], 1)[:, : grad.size(1)],
    "one row": lambda grad: grad[:1].expand_as(grad),
    "one item": lambda grad: grad[:1, :1].expand_as(grad),
}


def tables(dim, dtype):
    yield StandardEmbedding(V, dim, dtype=dtype)
    for size in (1, 2, 3):
        for rank in range(size):
            for kind in SHARDED.values():
                yield kind(FakeGang("cpu", rank=rank, size=size), V, dim, dtype=dtype)


def gradient(embed, ids, grad):
    embed.zero_grad()
    embed(ids).backward(grad)
    return embed.weight.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 7, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_depend_on_values_only(layout, dim, dtype):
    """They do not depend on the cut of the table."""
    generator = torch.Generator().manual_seed(dim)
    ids = torch.randint(V, (N,), generator=generator)
    grad = LAYOUTS[layout](torch.randn(N, dim, generator=generator).to(dtype))
    copy = grad.clone(memory_format=torch.contiguous_format)
    whole = gradient(StandardEmbedding(V, dim, dtype=dtype), ids, copy)
    for embed in tables(dim, dtype):
        rows, columns = embed.rows, embed.columns
        expected = whole[rows.start : rows.stop, columns.start : columns.stop]
        assert_same_bits(gradient(embed, ids, grad), expected, f"gradients of {embed}")


def test_bf16_is_summed_in_fp32():
    grad = torch.full((N, 4), 0.01, dtype=torch.bfloat16)
    grad[0] = 8.0
    exact = grad.double().sum(0).to(torch.bfloat16)
    ids = torch.zeros(N, dtype=torch.long)
    for given_grad in (grad, grad.t().contiguous().t()):
        found = gradient(StandardEmbedding(V, 4, dtype=torch.bfloat16), ids, given_grad)
        assert torch.equal(found[0], exact)


@given(
    vocab=st.integers(1, 5000),
    size=st.integers(1, 9),
    pad=st.none() | st.integers(0, 4999),
    count=st.sampled_from([0, 1, 100, 3072, 3073, 8192]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_rows_are_within_the_buffers_of_cuda(vocab, size, pad, count, dtype):
    ids = (torch.arange(count) % vocab).to(dtype)
    pad_idx = None if pad is None else pad % vocab
    for rank in range(size):
        own = Partition(vocab, size).shard(rank)
        rows = rows_to_sum(ids, own, pad_idx)
        assert rows.dtype == dtype
        if own:  # Otherwise nothing is launched.
            check_kernel(rows, len(own) + 1, 4)
        held = (ids >= own.start) & (ids < own.stop)
        if pad_idx is not None:
            held &= ids != pad_idx
        assert torch.equal(rows < len(own), held)
        assert torch.equal(rows[held] + own.start, ids[held])


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("count", "dim", "num_rows"), [(8192, 4, 0), (0, 4, 5), (5000, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_launched_for_what_is_empty(dtype, count, dim, num_rows):
    grad, rows = torch.ones(count, dim, dtype=dtype), torch.full((count,), num_rows)
    with Called() as called:
        sums = sum_all(grad, rows, num_rows)
    assert called.names == ["new_zeros"]
    assert torch.equal(sums, torch.zeros(num_rows, dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_takes_the_memory_over(dtype):
    """Makes no copy: it costs only one more row."""
    weight = torch.nn.Parameter(torch.zeros(6, 4, dtype=dtype))
    given_grad = sum_all(torch.ones(9, 4, dtype=dtype), torch.arange(9) % 7, 6)
    address = given_grad.data_ptr()

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(ctx, grad):
            nonlocal given_grad
            taken, given_grad = given_grad, None
            return taken

    Given.apply(weight).backward()
    assert weight.grad.data_ptr() == address
    assert weight.grad.is_contiguous()
    assert weight.grad.untyped_storage().nbytes() == 7 * 4 * dtype.itemsize
    assert torch.equal(weight.grad, torch.tensor([2, 2, 1, 1, 1, 1])[:, None].expand(6, 4))
