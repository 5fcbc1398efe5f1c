"""Several gradients at once, by ``is_grads_batched=True``."""

from __future__ import annotations

import pytest
import torch

from parity import SHARDED, assert_same_bits
from tp_embed import OutputHead, StandardEmbedding

V, E = 11, 5
IDS = torch.tensor([[1, 2, 10], [4, 2, 0]])


def whole_table(reuse_grad):
    torch.manual_seed(0)
    return StandardEmbedding(V, E, pad_idx=2, reuse_grad=reuse_grad)


def batched(weight, output):
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(3, *output.shape, generator=generator)
    return torch.autograd.grad(output, weight, grads, is_grads_batched=True, retain_graph=True)[0]


def one_by_one(weight, output):
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(3, *output.shape, generator=generator)
    found = [torch.autograd.grad(output, weight, grad, retain_graph=True)[0] for grad in grads]
    return torch.stack([g.full_tensor() if hasattr(g, "full_tensor") else g for g in found])


def look_up(gang, kind, reuse_grad, dedup):
    plain = torch.nn.Embedding(V, E, 2, _weight=whole_table(False).weight.detach())
    expected = one_by_one(plain.weight, plain(IDS))
    embed = whole_table(reuse_grad)
    if kind != "standard":
        embed = SHARDED[kind].from_embedding(embed, gang, dedup=dedup)
    for _ in range(2):
        found = batched(embed.weight, embed(IDS))
        whole = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert_same_bits(whole, expected, "gradients")
        embed(IDS).sum().backward()  # Puts a gradient into the reused memory.


@pytest.mark.parametrize("reuse_grad", [False, True])
@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("kind", ["standard", *sorted(SHARDED)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_batched_gradients_are_those_one_by_one(pool, size, kind, dedup, reuse_grad):
    pool(size, look_up, kind, reuse_grad, dedup)


def look_up_blocks(gang, kind):
    embed = SHARDED[kind].from_embedding(whole_table(False), gang, output="sequence")
    output = embed(IDS)
    if gang.size == 1:
        assert_same_bits(batched(embed.weight, output), one_by_one(embed.weight, output), "all")
        return
    with pytest.raises(ValueError, match="`is_grads_batched` must be False where"):
        batched(embed.weight, output)


@pytest.mark.parametrize("kind", sorted(SHARDED))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_blocks_of_positions_are_refused(pool, size, kind):
    pool(size, look_up_blocks, kind)


def project(gang, kind):
    embed = SHARDED[kind].from_embedding(whole_table(False), gang)
    head = OutputHead(embed)
    x = torch.randn(2, 3, E, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for wanted in (embed.weight, x):
        if gang.size > 1:
            with pytest.raises(ValueError, match="`is_grads_batched` must be False where"):
                batched(wanted, head(x))
            continue
        assert_same_bits(batched(wanted, head(x)), one_by_one(wanted, head(x)), "gradients")


@pytest.mark.parametrize("kind", sorted(SHARDED))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_heads_are_right_or_refused(pool, size, kind):
    pool(size, project, kind)
