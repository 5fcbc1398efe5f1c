"""Compares the head over the table of a sharded embedding with ``torch.nn.functional.linear``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from parity import whole
from tp_embed import (
    FakeGang,
    OutputHead,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.nn.loss import cross_entropy

MIDDLE = FakeGang("cpu", rank=1, size=3)


def head_and_reference(gang, kind):
    torch.manual_seed(2)
    table = StandardEmbedding(11, 7)
    bias = nn.Parameter(torch.randn(11))
    hidden = torch.randn(2, 3, 7, requires_grad=True)
    upstream = torch.randn(2, 3, 11)
    nn.functional.linear(hidden, table.weight, bias).backward(upstream)
    expected = [hidden.grad, bias.grad, table.weight.grad]
    hidden.grad = bias.grad = None

    embed = kind.from_embedding(table, gang)
    head = OutputHead(embed, bias=bias)
    assert head.weight is embed.weight
    with CommDebugMode() as forward:
        logits = head(hidden)
    with CommDebugMode() as backward:
        logits.backward(upstream)
    torch.testing.assert_close(logits, nn.functional.linear(hidden, table.weight, bias))
    torch.testing.assert_close([hidden.grad, bias.grad, whole(embed, embed.weight.grad)], expected)
    return [{str(n): c for n, c in mode.get_comm_counts().items()} for mode in (forward, backward)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_head_is_linear_and_sends_what_it_says(pool, size):
    gather, reduce = {"c10d._allgather_base_": 1}, {"c10d.allreduce_": 1}
    rows, columns = ([gather, reduce], [reduce, gather]) if size > 1 else ([{}, {}], [{}, {}])
    assert pool(size, head_and_reference, VocabShardedEmbedding) == [rows] * size
    assert pool(size, head_and_reference, ShardedEmbedding) == [columns] * size


def test_head_needs_a_sharded_embedding():
    with pytest.raises(TypeError, match=r"must be .* but is a `StandardEmbedding` instead"):
        OutputHead(StandardEmbedding(3, 2))
    embed = VocabShardedEmbedding(MIDDLE, 11, 6)
    with pytest.raises(ValueError, match=r"shape \(11,\) .*, but has \(4,\) instead"):
        OutputHead(embed, bias=nn.Parameter(torch.zeros(4)))
    with pytest.raises(
        ValueError, match=r"`output` must be one of \('replicated', 'deferred'\) for"
    ):
        OutputHead(ShardedEmbedding(MIDDLE, 11, 6), output="shard")
    with pytest.raises(ValueError, match=r"`soft_cap` must be positive, or None .*, but is -1"):
        OutputHead(embed, soft_cap=-1.0)
    assert repr(OutputHead(embed)) == "OutputHead(rows=4:8, shard=1/3)"
    capped = OutputHead(embed, soft_cap=30.0, output="shard")
    assert repr(capped) == "OutputHead(rows=4:8, shard=1/3, soft_cap=30.0, output='shard')"


def capped_head_and_reference(gang, kind):
    """Compares all logits, rank-local logits, and the loss, which overrides the head's cap."""
    torch.manual_seed(2)
    table = StandardEmbedding(11, 7, dtype=torch.float64)
    bias = nn.Parameter(torch.randn(11, dtype=torch.float64))
    hidden = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (2, 3))
    logits = nn.functional.linear(hidden, table.weight, bias)
    expected = 1.5 * (logits / 1.5).tanh()
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), target.flatten())
    inputs = [hidden, bias, table.weight]
    gradients = torch.autograd.grad(loss, inputs)

    embed = kind.from_embedding(table, gang)
    head = OutputHead(embed, bias=bias, soft_cap=1.5)
    torch.testing.assert_close(head(hidden), expected)
    ways = [
        lambda: head.loss(hidden, target),
        lambda: OutputHead(embed, bias=bias).loss(hidden, target, soft_cap=1.5),
        lambda: nn.functional.cross_entropy(head(hidden).flatten(0, 1), target.flatten()),
    ]
    if kind is VocabShardedEmbedding:
        local = OutputHead(embed, bias=bias, soft_cap=1.5, output="shard")
        ways.append(lambda: cross_entropy(local(hidden), target, gang, embed.partition))
    for way in ways:
        found = way()
        torch.testing.assert_close(found, loss)
        grads = torch.autograd.grad(found, [hidden, bias, embed.weight])
        torch.testing.assert_close([*grads[:2], whole(embed, grads[2])], list(gradients))
    assert not head.loss(hidden, target, soft_cap=None).isclose(loss)


@pytest.mark.parametrize("kind", [VocabShardedEmbedding, ShardedEmbedding])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_soft_cap(pool, size, kind):
    pool(size, capped_head_and_reference, kind)


def compiled_head_and_eager(gang, kind):
    torch.manual_seed(2)
    embed = kind.from_embedding(StandardEmbedding(11, 7), gang)
    bias = nn.Parameter(torch.randn(11))
    head = OutputHead(embed, bias=bias)
    hidden, target = torch.randn(2, 3, 7), torch.randint(11, (2, 3))
    for way in (head, lambda x: head.loss(x, target)):
        found = []
        for run in (way, torch.compile(way, backend="aot_eager")):
            x = hidden.clone().requires_grad_()
            output = run(x)
            inputs = [x, embed.weight, bias]
            found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [VocabShardedEmbedding, ShardedEmbedding])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_compiled_head_is_eager(pool, size, kind):
    pool(size, compiled_head_and_eager, kind)
