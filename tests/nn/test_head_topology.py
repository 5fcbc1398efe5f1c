"""Values and gradients of a head with ``deterministic="topology"``: the same bits at every size of
the gang and for both ways of sharding, and equal torch's on all logits."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from loss_problems import expected_loss
from parity import whole
from token_problems import WAYS, capped, logits_of, problem
from tp_embed import FakeGang, OutputHead, Partition, ShardedEmbedding, shard_embeddings
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.integrations.deepspeed.config import read_section
from tp_embed.nn import tiled, tiles
from tp_embed.nn.init import normal

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


def plain_loss(logits, _, target, *, scale=1.0, accum_dtype=None, **options):
    return expected_loss(scale * logits.flatten(0, -2), target.flatten(), **options)


def by_logits(head, x, teacher, target):
    return head(x)


ALL_WAYS = {
    **{name: (ours, theirs) for name, (ours, theirs, _) in WAYS.items()},
    **{
        f"loss, {name}": (partial(by_loss, **options), partial(plain_loss, **options))
        for name, options in LOSSES.items()
    },
    "logits": (by_logits, lambda logits, *_: logits),
}
OF_IGNORED = {"smooth losses", "weighted mean", "loss, smooth"}


def make(gang, kind, way, num_classes, dtype, dim, soft_cap=None):
    """Returns an embedding and its head, hidden states, bias, the arguments of the way, and what
    torch computes."""
    student, teacher, target = problem(num_classes, dtype, dim)
    student[2].requires_grad_()
    if way in OF_IGNORED:
        target = target.clamp_min(0)
    ours, theirs = ALL_WAYS[way]
    if "soft_cap" in str(ours):
        soft_cap = None
    expected = theirs(logits_of(student, soft_cap), logits_of(teacher, soft_cap).detach(), target)
    embed = kind.from_embedding(student[0], gang)
    of_teacher = kind.from_embedding(teacher[0], gang)
    head = OutputHead(embed, bias=student[1], soft_cap=soft_cap, deterministic="topology")
    teacher_head = OutputHead(of_teacher, bias=teacher[1], soft_cap=soft_cap)
    arguments = (teacher[2], teacher_head), target
    return student, embed, lambda x: ours(head, x, *arguments), expected


def digest(tensor):
    values = tensor.detach().flatten().view(torch.uint8)
    return hashlib.sha256(bytes(values.tolist())).hexdigest()[:16]


def digests(gang, kind, ways, dtype, num_classes, dim, tile, soft_cap=None):
    """Digests of values and gradients of hidden states, weight and bias in each way. The weight
    also gets the gradient of a lookup."""
    tiles._TILE, tiled.MIN_TOKENS, tiled._CHUNK_ITEMS = tile, 3, 4 * num_classes
    found = {}
    for way in ways:
        (_, bias, x), embed, ours, _ = make(gang, kind, way, num_classes, dtype, dim, soft_cap)
        x = x + embed(torch.arange(10).view(2, 5) % num_classes)
        x.retain_grad()
        values = ours(x)
        torch.manual_seed(5)
        values.backward(torch.randn(values.shape).to(values.dtype))
        results = values, x.grad, whole(embed, embed.weight.grad), bias.grad
        found[way] = [digest(tensor) for tensor in results]
    return found


def check_same(pool, sizes, *args):
    expected = pool(1, digests, VocabSharded, *args)[0]
    for kind in KINDS:
        for size in sizes:
            for found in pool(size, digests, kind, *args, timeout=120):
                assert found == expected, (kind, size)


# Small tiles, several in a shard, and large ones, each in several shards.
@pytest.mark.parametrize("tile", [4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_at_every_size(pool, dtype, tile):
    check_same(pool, [1, 2, 3, 4], list(ALL_WAYS), dtype, 37, 6, tile, 1.5)


def test_bits_are_the_same_in_fp64(pool):
    check_same(pool, [1, 2, 3], ["loss, mean", "entropy", "logits"], torch.float64, 37, 5, 8)


def test_bits_are_the_same_with_empty_shards(pool):
    check_same(pool, [2, 4], sorted(set(ALL_WAYS) - OF_IGNORED), torch.float32, 5, 6, 2)


# Shards begin where memory isn't aligned as products want it.
@pytest.mark.parametrize("dim", [33, 64])
def test_bits_are_the_same_for_large_tables(pool, dim):
    for dtype in (torch.float32, torch.bfloat16):
        check_same(pool, [2, 3], ["loss, mean", "log-probs", "logits"], dtype, 2003, dim, 128)


def compare(gang, kind, soft_cap, tile):
    """Values and gradients, with what torch computes, for some and for all inputs."""
    tiles._TILE, tiled.MIN_TOKENS, tiled._CHUNK_ITEMS = tile, 3, 4 * 37
    for way in ALL_WAYS:
        student, embed, ours, expected = make(gang, kind, way, 37, torch.float64, 6, soft_cap)
        table, bias, x = student
        upstream = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, [x, bias, table.weight], upstream)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected)
        found = ours(x)
        torch.testing.assert_close(found, expected)
        for _ in range(2):
            grads = torch.autograd.grad(found, [x, bias, embed.weight], upstream, retain_graph=True)
            torch.testing.assert_close(list(grads[:2]), list(wanted[:2]))
            torch.testing.assert_close(whole(embed, grads[2]), wanted[2])
        embed.weight.requires_grad_(False)
        bias.requires_grad_(False)
        torch.testing.assert_close(torch.autograd.grad(ours(x), x, upstream)[0], wanted[0])
        embed.weight.requires_grad_(True)
        (grad,) = torch.autograd.grad(ours(x.detach()), embed.weight, upstream)
        torch.testing.assert_close(whole(embed, grad), wanted[2])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_torch(pool, kind, size):
    for soft_cap, tile in [(None, 512), (1.5, 5)]:
        pool(size, compare, kind, soft_cap, tile, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_fp32(dtype):
    torch.manual_seed(0)
    embed = VocabSharded(FakeGang("cpu"), 3000, 64, init_fn=partial(normal, std=0.1), dtype=dtype)
    x, target = torch.randn(300, 64, dtype=dtype), torch.randint(3000, (300,))
    head = OutputHead(embed, deterministic="topology")
    logits = functional.linear(x.double(), embed.weight.double())
    losses = functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(head.log_probs(x, target).double(), -losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(head.loss(x, target).double(), losses.mean(), rtol=1e-6, atol=0)
    entropies = WAYS["entropy"][1](logits)
    torch.testing.assert_close(head.entropy(x).double(), entropies, rtol=1e-6, atol=0)
    torch.testing.assert_close(head(x), logits.to(dtype), atol=1e-5, rtol=torch.finfo(dtype).eps)


def of_own_positions(gang, kind):
    """Hidden states of this rank's positions give the same bits as all positions at once."""
    tiles._TILE = 4
    _, bias, x = problem(11, torch.float32, 6)[0]
    table, target = problem(11, torch.float32, 6)[0][0], torch.arange(10).view(2, 5)
    block = Partition(5, gang.size).shard(gang.rank)
    found = []
    for name in ("replicated", "sequence"):
        embed = kind.from_embedding(table, gang)
        head = OutputHead(embed, bias=bias, input=name, deterministic="topology")
        own = x if name == "replicated" else x[:, block.start : block.stop]
        own = own.detach().requires_grad_()
        logits, loss = head(own), head.loss(own, target)
        inputs = [own, embed.weight, bias]
        grads = torch.autograd.grad(loss + capped(logits, 2.0).square().sum(), inputs)
        found.append((loss, logits, *grads))
    (*values, grad, weight, of_bias), (*others, own_grad, own_weight, own_of_bias) = found
    assert all(map(torch.equal, values, others))
    assert torch.equal(grad[:, block.start : block.stop], own_grad)
    assert torch.equal(weight, own_weight)
    assert torch.equal(of_bias, own_of_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_each_rank(pool, kind):
    for size in (1, 2, 3):
        pool(size, of_own_positions, kind)


def sums_in_any_order(gang):
    torch.manual_seed(0)
    terms = torch.randn(64, 7, 5) * torch.exp(8 * torch.randn(64, 7, 1))
    terms[3:60:4] *= 2.0**-30  # Loses some bits.
    bound = terms.abs().amax(-1).sum(0)
    sums = tiles.ExactSums(bound, 5)
    for term in terms[torch.randperm(64)][gang.rank :: gang.size]:
        sums.add(term)
    found = sums.reduce(gang)
    exact = terms.double().sum(0)
    assert ((found - exact).abs() <= 64 * 2.0**-48 * bound[:, None].double()).all()
    return found.tolist()


def test_sums_do_not_depend_on_their_order(pool):
    (expected,) = pool(1, sums_in_any_order)
    for size in (2, 3):
        assert pool(size, sums_in_any_order) == [expected] * size


def head_of(kind=VocabSharded, **options):
    (table, bias, x), _, target = problem(11, torch.float32, 6)
    embed = kind.from_embedding(table, FakeGang("cpu"))
    head = OutputHead(embed, bias=bias, deterministic="topology", **options)
    return head, x.requires_grad_(), target.clamp_min(0)


def test_no_token():
    head, x, target = head_of()
    for nothing in (x[:, :0], x):
        ids = target[:, : nothing.size(1)].clone().fill_(-100)
        loss = head.loss(nothing, ids)
        assert loss.isnan()
        x.grad = None
        loss.backward()
        assert not x.grad.any()
        assert not head.weight.grad.any()
        assert not head.loss(nothing, ids, reduction="sum")
        assert not head.log_probs(nothing, ids).any()
    assert head.entropy(x[:, :0]).shape == head(x[:, :0]).shape[:-1] == (2, 0)
    assert head.top_k(x[:, :0], 2)[1].shape == (2, 0, 2)


def test_nan_and_infinity_are_not_lost():
    for value in (torch.nan, torch.inf):
        head, x, target = head_of()
        with torch.no_grad():
            head.weight[7, 2] = value
        loss = head.loss(x, target)
        loss.backward()
        assert not loss.isfinite()
        assert not x.grad.isfinite().any()


def test_ignored_tokens_may_be_nan():
    head, x, target = head_of()
    target[1, 2] = -100
    with torch.no_grad():
        x[1, 2] = torch.nan
    head.loss(x, target).backward()
    assert torch.isfinite(head.weight.grad).all()
    assert not x.grad[1, 2].any()
    assert torch.isfinite(x.grad).all()


def test_options_are_checked():
    head, x, target = head_of()
    embed = VocabSharded(FakeGang("cpu"), 11, 6)
    with pytest.raises(ValueError, match="`deterministic` must be None or 'topology', but is True"):
        OutputHead(embed, deterministic=True)
    with pytest.raises(ValueError, match=r"must not be 'shard' .* Use `head.loss\(\)`"):
        OutputHead(embed, output="shard", deterministic="topology")
    head.output = "shard"
    with pytest.raises(ValueError, match="must not be 'shard'"):
        head(x)
    with pytest.raises(ValueError, match="`reduction` must be"):
        head.loss(x, target, reduction="max")
    with pytest.raises(ValueError, match="`accum_dtype` must be"):
        head.loss(x, target, accum_dtype=torch.float16)
    with pytest.raises(ValueError, match="one class for each token"):
        head.loss(x, target[0])
    with pytest.raises(IndexError, match="token 3 has 11"):
        head.loss(x.flatten(0, 1)[:4], torch.tensor([0, 1, 2, 11]))
    assert repr(OutputHead(embed, deterministic="topology")).endswith("deterministic='topology')")


def test_second_derivatives_and_transforms_are_refused():
    head, x, target = head_of()
    functions = [
        lambda x: head.loss(x, target),
        lambda x: head.log_probs(x, target).sum(),
        lambda x: head.top_k(x, 2)[0].sum(),
        lambda x: head(x).sum(),
    ]
    for function in functions:
        with pytest.raises(ValueError, match=r"`deterministic` must be None for derivatives"):
            torch.autograd.grad(function(x), x, create_graph=True)
        with pytest.raises(ValueError, match=r"must be None for transforms of `torch.func`"):
            torch.func.grad(function)(x)
        with pytest.raises(ValueError, match=r"must be None for transforms"):
            function(x.to("meta"))
    values = head.log_probs(x, target)
    with pytest.raises(ValueError, match=r"and several at once"):
        torch.autograd.grad(values, x, torch.ones(3, *values.shape), is_grads_batched=True)
    head.deterministic = None
    torch.autograd.grad(head.loss(x, target), x, create_graph=True)


def test_deferred_logits():
    head, x, target = head_of()
    expected = head.loss(x, target)
    head.output = "deferred"
    assert torch.equal(functional.cross_entropy(head(x).flatten(0, 1), target.flatten()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    head, x, target = head_of(kind)
    other = OutputHead(kind.from_embedding(problem(11, torch.float32, 6)[0][0], head.gang))
    other.bias = head.bias
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = head.loss(x, target), other.loss(x, target)
        assert head(x).dtype == other(x).dtype
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found, [x, head.weight])
    wanted = torch.autograd.grad(expected, [x, other.weight])
    torch.testing.assert_close(grads, wanted, rtol=2e-2, atol=1e-3)


def sent(gang, kind, num_classes):
    """The bytes that each collective of a loss and its backward sends."""
    tiles._TILE = 8
    (table, bias, x), _, target = problem(num_classes, torch.float32, 6)
    head = OutputHead(kind.from_embedding(table, gang), bias=bias, deterministic="topology")
    found = []

    def hook(operation, tensors):
        found.append((operation, sum(tensor.nbytes for tensor in tensors)))
        return nullcontext()

    handle = gang.register_collective_hook(hook)
    head.loss(x.requires_grad_(), target.clamp_min(0)).backward()
    handle.remove()
    return found


def test_what_is_sent(pool):
    sums = [("all_reduce", 8), ("all_gather", 3 * 10 * 4), ("all_reduce", 10 * 6 * 8)]
    of_bias = [("all_reduce", 16 * 4)]
    assert pool(2, sent, VocabSharded, 16) == [sums + of_bias] * 2
    table = [("all_to_all", 8 * 3 * 4)]
    assert pool(2, sent, ShardedEmbedding, 16) == [table + sums + table + of_bias] * 2
    # The second rank sends one row, and gets its gradient.
    first, second = pool(2, sent, VocabSharded, 14)
    assert [first[0], second[0]] == [("all_to_all", 0), ("all_to_all", 1 * 6 * 4)]
    assert [first[4], second[4]] == [("all_to_all", 1 * 6 * 4), ("all_to_all", 0)]


def in_a_model(gang):
    model = nn.Module()
    model.embed = nn.Embedding(11, 6)
    model.head = nn.Linear(6, 11, bias=False)
    model.head.weight = model.embed.weight
    shard_embeddings(model, gang, head_deterministic="topology")
    assert model.head.deterministic == "topology"


def test_heads_of_a_model(pool):
    pool(2, in_a_model)
    with pytest.raises(ValueError, match=r"head_deterministic.* must be null with `shard_logits`"):
        read_section({"tp_embed": {"shard_logits": True, "head_deterministic": "topology"}})
