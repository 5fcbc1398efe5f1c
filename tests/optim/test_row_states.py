"""The states of row optimizers: fp32 values of 16-bit weights, sizes, and state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
from test_row_optimizers import DECAY, KINDS, LR, E, V, batches, train, whole_table

from tp_embed.optim import RowwiseAdagrad, RowwiseAdam
from tp_embed.optim.masters import _remainder, join

HALVES = [torch.bfloat16, torch.float16]


def test_a_bf16_number_and_the_remainder_are_an_fp32_number():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=generator).int()
    values = bits.view(torch.float32)
    values = values[values.isfinite() & (values.abs() < 3e38)]
    is_tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    found = join(values.bfloat16(), _remainder(values))
    assert torch.equal(found[~is_tie], values[~is_tie])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("upper", [0x3F80, 0x3F81, 0x0000, 0x0001])
def test_halfway_between_two_bf16_numbers(upper, sign):
    """Where bf16 rounds down, one unit in the last place is missing; elsewhere nothing is."""
    values = torch.tensor([upper << 16 | 0x8000], dtype=torch.int32).view(torch.float32) * sign
    off = join(values.bfloat16(), _remainder(values)).view(torch.int32) - values.view(torch.int32)
    assert off.item() == (-1 if upper % 2 == 0 else 0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_16_bit_weights_as_fp32_ones(kind, dtype):
    half = whole_table(dtype=dtype)
    single = whole_table()
    with torch.no_grad():
        single.weight.copy_(half.weight)
    pairs = [(e, KINDS[kind]([e.weight], lr=LR, weight_decay=DECAY)) for e in (half, single)]
    for ids, grad in batches():
        single.weight.grad = None
        single(ids).backward(grad)
        for embed, optimizer in pairs:
            optimizer.step(grads={embed.weight: single.weight.grad})
        assert torch.equal(half.weight, single.weight.to(dtype))
    # At most one unit in the last place.
    torch.testing.assert_close(pairs[0][1].master(half.weight), single.weight, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_refresh_takes_written_weights(dtype):
    embed = whole_table(dtype=dtype)
    optimizer = train(embed, "rowwise_adagrad", 0.0)
    with torch.no_grad():
        embed.weight.fill_(3)
    optimizer.refresh()
    assert torch.equal(optimizer.master(embed.weight), torch.full((V, E), 3.0))
    optimizer.step(grads={embed.weight: torch.zeros(V, E).to_sparse(1)})
    assert torch.equal(embed.weight, torch.full((V, E), 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_from_a_state_dict(kind, dtype, tmp_path):
    torch.manual_seed(0)
    embed = whole_table(dtype=dtype)
    optimizer = train(embed, kind, DECAY)
    torch.save([embed.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    other = whole_table(dtype=dtype)
    resumed = KINDS[kind]([other.weight])
    table, state = torch.load(tmp_path / "saved.pt")
    other.load_state_dict(table)
    resumed.load_state_dict(state)
    for ids, grad in batches():
        for one, its in ((embed, optimizer), (other, resumed)):
            its.zero_grad()
            one(ids).backward(grad.to(dtype))
            its.step()
    assert torch.equal(embed.weight, other.weight)
    for name, value in optimizer.state[embed.weight].items():
        found = resumed.state[other.weight][name]
        if isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
        else:
            assert found == value


def test_a_copy_is_an_optimizer_of_its_own():
    embed = whole_table()
    optimizer = train(embed, "rowwise_adam", DECAY)
    copied = copy.deepcopy(optimizer)
    assert copied.state_dict()["state"][0]["step"] == optimizer.state_dict()["state"][0]["step"]


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [
        (RowwiseAdagrad, torch.bfloat16, 2.5),
        (RowwiseAdagrad, torch.float32, 0.5),
        (RowwiseAdam, torch.bfloat16, 6.5),
        (RowwiseAdam, torch.float32, 4.5),
    ],
)
def test_bytes_of_the_state(kind, dtype, most):
    weight = torch.nn.Parameter(torch.randn(100, 64).to(dtype))
    optimizer = kind([weight], weight_decay=DECAY)
    optimizer.step(grads={weight: torch.ones(100, 64).to_sparse(1)})
    states = [s for s in optimizer.state[weight].values() if isinstance(s, torch.Tensor)]
    assert sum(state.nbytes for state in states) <= most * weight.numel()
