"""Ids out of range raise on every rank, before anything is sent."""

from __future__ import annotations

import pytest
import torch

from parity import SHARDED, assert_same_bits
from tp_embed import ShardedEmbedding, StandardEmbedding
from tp_embed.lookup.ids import IdCheck

SIZES = [1, 2, 3, 4]
KINDS = sorted(SHARDED)

# V = 11 gives 3 rows per rank in a gang of 4, where id 11 would fit into the last block.
V, E = 11, 6

INT64 = torch.iinfo(torch.int64)

# The ids, the smallest bad one, and its first position.
OUT_OF_RANGE = {
    "one too many": (torch.tensor([[1, 2, 3], [4, 11, 5]]), 11, (1, 1)),
    "minus one": (torch.tensor([0, 10, -1]), -1, (2,)),
    "the smallest of several": (torch.tensor([[99, 3, 12], [50, 11, 4]]), 11, (1, 1)),
    "the smallest is negative": (torch.tensor([[99, -2, 1], [-7, 5, -7]]), -7, (1, 0)),
    "the first of equals": (torch.tensor([[4, 5], [30, 30], [30, 1]]), 30, (1, 0)),
    "0-d": (torch.tensor(400), 400, ()),
    "3-d": (torch.arange(12).view(2, 3, 2), 11, (1, 2, 1)),
    "int32": (torch.tensor([3, 11, 4], dtype=torch.int32), 11, (1,)),
    "int8": (torch.tensor([3, -128, -4], dtype=torch.int8), -128, (1,)),
    "uint8": (torch.tensor([3, 255, 4], dtype=torch.uint8), 255, (1,)),
    "uint16": (torch.tensor([3, 65535], dtype=torch.uint16), 65535, (1,)),
    "the largest int64": (torch.tensor([3, INT64.max, 1]), INT64.max, (1,)),
    "the smallest int64": (torch.tensor([3, INT64.min, 1]), INT64.min, (1,)),
}

WRONG = {
    "float32": torch.tensor([1.0, 2.0]),
    "bfloat16": torch.tensor([1.0, 2.0]).bfloat16(),
    "bool": torch.tensor([True, False]),
    "complex64": torch.tensor([1.0 + 0j]),
}

INTEGERS = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def table():
    embed = StandardEmbedding(V, E)
    with torch.no_grad():
        embed.weight.copy_(torch.arange(float(V * E)).view(V, E))
    return embed


def ask(embed, batches):
    """Returns the error of `embed` for each batch, and its output for valid ids afterwards."""
    errors = []
    good = torch.tensor([[0, 10], [3, 7]])
    for ids in batches:
        try:
            embed(ids)
        except (IndexError, TypeError) as e:
            errors.append((type(e), str(e)))
        else:
            errors.append((None, "no error"))
        output = embed(good)
        output.sum().backward()
        assert_same_bits(output.detach(), table().weight.detach()[good], "outputs")
    return errors


def ask_out_of_range(gang, kind, name):
    ids = OUT_OF_RANGE[name][0]
    return ask(SHARDED[kind].from_embedding(table(), gang), [ids, ids])


def ask_wrong(gang, kind):
    return ask(SHARDED[kind].from_embedding(table(), gang), WRONG.values())


def assert_names(error, bad, position):
    kind, message = error
    assert kind is IndexError, message
    assert f"must be in [0, {V}) (num_embeddings)" in message
    assert f"the id at position {position} is {bad} instead" in message


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_out_of_range(name):
    ids, bad, position = OUT_OF_RANGE[name]
    (error,) = ask(table(), [ids])
    assert_names(error, bad, position)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_out_of_range_on_every_rank(pool, name, kind, size):
    _, bad, position = OUT_OF_RANGE[name]
    for rank, errors in enumerate(pool(size, ask_out_of_range, kind, name)):
        for error in errors:
            assert_names(error, bad, position)
            assert f"Gang(rank={rank}, size={size}, " in error[1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_dtype_on_every_rank(pool, kind, size):
    for errors in (ask(table(), WRONG.values()), *pool(size, ask_wrong, kind)):
        for name, (error, message) in zip(WRONG, errors, strict=True):
            assert error is TypeError
            assert f"must have an integer dtype, but has torch.{name} instead" in message
            assert "`x.long()`" in message


def test_ids_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"`x` must be a tensor of token ids, but is a .*list"):
        table()([1, 2, 3])


def look_up(gang, kind, dtype):
    embed = SHARDED[kind].from_embedding(table(), gang)
    output = embed(torch.tensor([[0, 10], [3, 3]]).to(dtype))
    output.sum().backward()
    embed.weight = torch.nn.Parameter(embed.weight.grad)
    return output.detach(), embed.to_embedding().weight.detach()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_any_integer_dtype_works(pool, dtype):
    whole = table()
    expected = whole.weight.detach()[torch.tensor([[0, 10], [3, 3]])]
    output = whole(torch.tensor([[0, 10], [3, 3]]).to(dtype))
    output.sum().backward()
    assert_same_bits(output.detach(), expected, "outputs")
    for kind in KINDS:
        for sharded_output, gradient in pool(3, look_up, kind, dtype):
            assert_same_bits(sharded_output, expected, "outputs")
            assert_same_bits(gradient, whole.weight.grad, "gradients")


def deferred(gang):
    """Reads results two calls later, as on an accelerator, but on the CPU."""
    embed = ShardedEmbedding(gang, 11, 6)
    embed._lookup.id_check = IdCheck(lag=2)
    calls = []
    for ids in ([1, 2], [3, 99], [4], [5], [6]):
        try:
            embed._lookup.id_check(torch.tensor(ids), 11, gang)
            calls.append("ok")
        except IndexError as e:
            calls.append(str(e))
    embed._lookup.id_check(torch.tensor([-7]), 11, gang)
    with pytest.raises(IndexError, match=r"position \(0,\) is -7 instead"):
        embed.check_ids()
    embed.check_ids()
    return calls


@pytest.mark.parametrize("size", [1, 3])
def test_deferred_check_raises_at_the_same_call_on_every_rank(pool, size):
    for rank, calls in enumerate(pool(size, deferred)):
        assert calls[:3] + calls[4:] == ["ok"] * 4
        assert "the id at position (1,) is 99 instead" in calls[3]
        assert f"rank={rank}" in calls[3]
