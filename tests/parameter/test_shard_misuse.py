"""Swapping, copying or reading shards in other code raises an error that names the fix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.library import custom_op
from torch.nn.functional import linear

from tp_embed import OutputHead, ShardedEmbedding, VocabShardedEmbedding
from tp_embed.gang import FakeGang

V, E = 10, 4
IDS = torch.tensor([1, 2, 7])
KINDS = [ShardedEmbedding, VocabShardedEmbedding]


def make(kind, size=2, rank=0):
    return kind(FakeGang("cpu", rank=rank, size=size), V, E)


def assign_data(embed, table):
    embed.weight.data = table


def set_memory(embed, table):
    with torch.no_grad():
        embed.weight.set_(table)


def replace_entry(embed, table):
    embed._parameters["weight"] = nn.Parameter(table)


SWAPS = [assign_data, set_memory, replace_entry]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_does_not_compute_with_the_whole_table(kind, swap, size):
    embed = make(kind, size)
    head = OutputHead(embed)
    swap(embed, torch.randn(V, E))
    with pytest.raises(ValueError, match=r"must be this rank's shard, .* has the shape"):
        embed(IDS)
    if swap is not replace_entry:
        with pytest.raises(ValueError, match="must be this rank's shard"):
            head(torch.randn(3, E))
        with pytest.raises(ValueError, match="must be this rank's shard"):
            head.loss(torch.randn(3, E), IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_takes_no_whole_table(kind):
    with pytest.raises(ValueError, match="must be this rank's shard"):
        torch.func.functional_call(make(kind), {"weight": torch.randn(V, E)}, (IDS,))


def test_over_one_rank_any_table_is_assigned():
    embed, table = make(ShardedEmbedding, 1), torch.randn(V, E)
    embed.weight.data = table
    assert torch.equal(embed(IDS), table[IDS])


@custom_op("tp_embed_tests::project", mutates_args=())
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


READS = {
    "an operator of others": lambda weight: project(torch.randn(3, E), weight),
    "noise": torch.randn_like,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_another_read_is_refused(kind, read):
    with pytest.raises(ValueError, match="must be given the whole table"):
        read(make(kind).weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_reads_no_shard_either(kind):
    embed = make(kind)

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return linear(x, weight), None

    with pytest.raises(ValueError, match="must be given the whole table"):
        Reads.apply(torch.randn(3, E, requires_grad=True), embed.weight).backward()
    embed.weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.mean(-1))
    with pytest.raises(ValueError, match="must be given the whole table"):
        embed(IDS).sum().backward()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_gradient_is_one_of_a_shard(kind, sparse):
    embed = kind(FakeGang("cpu", size=2), V, E, sparse=sparse)
    embed(IDS).sum().backward()
    grad = embed.weight.grad
    copied = copy.deepcopy(grad)
    assert type(copied) is type(grad)
    assert torch.equal(copied.norm(), grad.norm())
