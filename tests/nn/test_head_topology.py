"""Values and gradients of a head with ``deterministic="topology"``: the same bits at every size of
the gang and for both ways of sharding, and those of torch on all logits."""

from __future__ import annotations

import hashlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from loss_problems import expected_loss
from parity import whole
from token_problems import WAYS, logits_of, problem
from tp_embed import FakeGang, OutputHead, ShardedEmbedding, StandardEmbedding
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.nn import tiled, tiles

KINDS = [VocabSharded, ShardedEmbedding]
LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "soft cap": {"soft_cap": 1.5, "scale": 0.7},
    "smooth": {"label_smoothing": 0.1, "ignore_index": 4},
    "z": {"z_loss": 0.1, "soft_cap": 2.0},
    "fp32": {"accum_dtype": torch.float32},
}


def by_loss(head, x, teacher, target, **options):
    return head.loss(x, target, **options)


def by_logits(head, x, teacher, target, **options):
    return head(x)


OURS = {
    **{name: ours for name, (ours, _, _) in WAYS.items()},
    **{f"loss, {name}": partial(by_loss, **options) for name, options in LOSSES.items()},
    "logits": by_logits,
}


def digest(tensor):
    values = tensor.detach().flatten().view(torch.uint8)
    return hashlib.sha256(bytes(values.tolist())).hexdigest()[:16]


def digests(gang, kind, ways, dtype, num_classes, dim, tile, soft_cap=None):
    """Digests of values and gradients of hidden states, weight and bias in each way. The weight
    also gets the gradient of a lookup."""
    tiles._TILE, tiled.MIN_TOKENS, tiled._CHUNK_ITEMS = tile, 3, 4 * num_classes
    found = {}
    for way in ways:
        student, teacher, target = problem(num_classes, dtype, dim)
        if "log" not in way and "losses" != way:
            target = target.clamp_min(0)
        embed = kind.from_embedding(student[0], gang)
        of_teacher = kind.from_embedding(teacher[0], gang)
        options = {"soft_cap": soft_cap, "deterministic": "topology"}
        head = OutputHead(embed, bias=student[1], **options)
        teacher_head = OutputHead(of_teacher, bias=teacher[1], soft_cap=soft_cap)
        x = (student[2] + embed(target.clamp_min(0))).requires_grad_()
        x.retain_grad()
        values = OURS[way](head, x, (teacher[2], teacher_head), target)
        torch.manual_seed(5)
        values.backward(torch.randn(values.shape).to(values.dtype))
        results = values, x.grad, whole(embed, embed.weight.grad), student[1].grad
        found[way] = [digest(tensor) for tensor in results]
        student[1].grad = None
    return found


def check_same(pool, sizes, *args):
    expected = pool(1, digests, VocabSharded, *args)[0]
    for kind in KINDS:
        for size in sizes:
            for found in pool(size, digests, kind, *args, timeout=120):
                assert found == expected, (kind, size)


# Tiles of which several are in a shard, and that are in several shards.
@pytest.mark.parametrize("tile", [4, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_at_every_size(pool, dtype, tile):
    check_same(pool, [1, 2, 3, 4], list(OURS), dtype, 37, 6, tile, 1.5)


def test_bits_are_the_same_in_fp64(pool):
    check_same(pool, [1, 2, 3], ["loss, mean", "entropy", "logits"], torch.float64, 37, 5, 8)


def test_bits_are_the_same_with_empty_shards(pool):
    ways = [way for way in OURS if way != "loss, smooth" and way != "smooth losses"]
    check_same(pool, [2, 3, 4], ways, torch.float32, 5, 6, 2)


# Shards begin where memory isn't aligned as products want it.
@pytest.mark.parametrize("dim", [33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_for_large_tables(pool, dtype, dim):
    ways = ["loss, mean", "log-probs", "logits"]
    check_same(pool, [1, 2, 3, 4], ways, dtype, 2003, dim, 128)
