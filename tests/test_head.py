"""The head that shares the table of a sharded embedding, against ``torch.nn.functional.linear``."""

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
    with pytest.raises(ValueError, match=r"`output` must be one of \('replicated',\) for"):
        OutputHead(ShardedEmbedding(MIDDLE, 11, 6), output="shard")
    head = OutputHead(embed)
    assert repr(head) == "OutputHead(rows=4:8, shard=1/3)"
