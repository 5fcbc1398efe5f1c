"""Compares second derivatives, transforms and graphs of heads and losses with plain torch in one
process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from loss_problems import expected_loss
from parity import SHARDED
from tp_embed import FakeGang, OutputHead, Partition
from tp_embed.gang.collectives import copy_to_gang, gather_columns, reduce_partial, scatter_columns
from tp_embed.nn.loss import cross_entropy

V, E, N = 7, 3, 5
ALL = {"ignore_index": 2, "label_smoothing": 0.3, "z_loss": 0.1, "soft_cap": 0.8}
OPTIONS = [
    {},
    {"ignore_index": 4, "reduction": "sum"},
    {"label_smoothing": 0.2, "z_loss": 0.1},
    {**ALL, "reduction": "sum"},
]
WAYS = [("vocab", "head"), ("vocab", "fused"), ("vocab", "shard")]
WAYS += [("embed", "head"), ("embed", "fused")]

per_way = pytest.mark.parametrize(("kind", "way"), WAYS)
per_size = pytest.mark.parametrize("size", [1, 2, 3])


def problem():
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    x, table, bias, mixing = draw(N, E), draw(V, E), draw(V), draw(E, E)
    target = torch.tensor([1, 6, 2, 3, 4])
    return x, table, bias, mixing, target


def own_part(table, gang, kind):
    """Returns this rank's block of a replicated table, differentiably."""
    if kind == "embed":
        return scatter_columns(table, gang, Partition(E, gang.size))
    own = Partition(V, gang.size).shard(gang.rank)
    return copy_to_gang(table, gang)[own.start : own.stop]


def our_loss(gang, kind, way, cap=None, **options):
    """Returns the loss as a function of hidden states, this rank's block, bias and target."""
    output = "shard" if way == "shard" else "replicated"
    embed = SHARDED[kind](gang, V, E, dtype=torch.float64)
    head = OutputHead(embed, bias=nn.Parameter(torch.zeros(V, dtype=torch.float64)), output=output)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x, target):
            if way == "fused":
                return head.loss(x, target, **options)
            if way == "shard":
                return cross_entropy(head(x), target, gang, embed.partition, **options)
            return expected_loss(head(x), target, **options)

    def loss(x, block, bias, target):
        parameters = {"head.weight": block, "head.bias": bias}
        return functional_call(Loss(), parameters, (x, target))

    return loss


def their_loss(x, table, bias, target, **options):
    return expected_loss(nn.functional.linear(x, table, bias), target, **options)


def both(gang, kind, way, options):
    """Returns our loss and torch's, both as functions of replicated inputs."""
    block_loss = our_loss(gang, kind, way, **options)

    def ours(x, table, bias, target):
        return block_loss(x, own_part(table, gang, kind), bias, target)

    return ours, partial(their_loss, **options)


def derivatives(loss, inputs, cotangents):
    """Returns products with the Hessian, and the gradient of a gradient penalty."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    products = torch.autograd.grad(first, inputs, cotangents, retain_graph=True)
    one = torch.autograd.grad(first[1], inputs[:1], cotangents[1], retain_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return [*products, *one, *torch.autograd.grad(penalty, inputs)]


def second_derivatives(gang, kind, way, options):
    x, table, bias, mixing, target = problem()
    cotangents = [torch.randn_like(tensor) for tensor in (mixing, table, bias)]
    block_loss = our_loss(gang, kind, way, **options)
    blocks = [own_part(tensor, gang, kind) for tensor in (table, cotangents[1])]
    ours = derivatives(
        lambda mixing, block, bias: block_loss((x @ mixing).tanh(), block, bias, target),
        [mixing, blocks[0], bias],
        [cotangents[0], blocks[1], cotangents[2]],
    )
    expected = derivatives(
        lambda mixing, table, bias: their_loss((x @ mixing).tanh(), table, bias, target, **options),
        [mixing, table, bias],
        cotangents,
    )
    cut = [own_part(e, gang, kind) if e.shape == table.shape else e for e in expected]
    torch.testing.assert_close(ours, cut)


@per_size
@per_way
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives_are_those_of_torch(pool, size, kind, way, options):
    pool(size, second_derivatives, kind, way, options)


def check_gradients(gang, kind, way, options):
    """Checks gradients numerically, with replicated inputs that all ranks change alike, in a random
    direction: in each would take minutes."""
    x, table, bias, _, target = problem()
    ours, _ = both(gang, kind, way, options)
    inputs = [tensor.requires_grad_() for tensor in (x[:4], table, bias)]
    loss, fast = lambda *i: ours(*i, target[:4]), {"fast_mode": True}
    assert gradcheck(loss, inputs, check_forward_ad=True, **fast)
    assert gradgradcheck(loss, inputs, check_fwd_over_rev=True, **fast)


@per_way
def test_gradcheck(pool, kind, way):
    for size, options in ((1, OPTIONS[2]), (2, OPTIONS[3]), (3, OPTIONS[2])):
        pool(size, check_gradients, kind, way, options)


def losses_of_tokens(gang):
    x, table, bias, mixing, target = problem()
    options = {"ignore_index": 2, "label_smoothing": 0.1}
    partition, weights = Partition(V, gang.size), torch.linspace(-1, 1, N, dtype=torch.float64)
    cotangents = [torch.randn_like(tensor) for tensor in (mixing, table, bias)]

    def ours(mixing, table, bias):
        local = copy_to_gang((x @ mixing).tanh(), gang) @ own_part(table, gang, "vocab").T
        own = partition.shard(gang.rank)
        local = local + copy_to_gang(bias, gang)[own.start : own.stop]
        losses = cross_entropy(local, target, gang, partition, reduction="none", **options)
        return (losses.square() * weights).sum()

    def theirs(mixing, table, bias):
        logits = nn.functional.linear((x @ mixing).tanh(), table, bias)
        losses = nn.functional.cross_entropy(logits, target, reduction="none", **options)
        return (losses.square() * weights).sum()

    inputs = [mixing, table, bias]
    torch.testing.assert_close(
        derivatives(ours, inputs, cotangents), derivatives(theirs, inputs, cotangents)
    )


@per_size
def test_second_derivatives_of_losses_of_tokens(pool, size):
    pool(size, losses_of_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_second_derivatives_in_low_precision(dtype, options):
    """Recovers the probabilities of logits from the saved gradient, also for confident logits."""
    logits = (4 * torch.randn(N, V, generator=torch.Generator().manual_seed(1))).to(dtype)
    target, direction = torch.tensor([1, 6, 2, 3, 4]), torch.randn(N, V)

    def product(loss, logits):
        logits = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(logits), logits, create_graph=True)
        return torch.autograd.grad(first, logits, direction.to(first.dtype))[0]

    ours = product(
        lambda logits: cross_entropy(logits, target, FakeGang("cpu"), Partition(V, 1), **options),
        logits,
    )
    theirs = product(lambda logits: expected_loss(logits, target, **options), logits.double())
    assert ours.dtype == dtype
    slack = 1e-6 if dtype == torch.float32 else 1e-2
    assert (ours.double() - theirs).abs().max() < slack * theirs.abs().max().clamp_min(1)


def tied(gang, kind, way):
    """Hidden states also depend on the block: no part of its gradient counts twice."""
    x, table, bias, mixing, target = problem()
    cotangents = [torch.randn_like(tensor) for tensor in (mixing, table, bias)]
    block_loss = our_loss(gang, kind, way)
    blocks = [own_part(tensor, gang, kind) for tensor in (table, cotangents[1])]

    def sums(block):
        if kind == "vocab":
            return reduce_partial(block.sum(0), gang)
        return gather_columns(block.sum(0), gang, Partition(E, gang.size))

    def ours(mixing, block, bias):
        return block_loss((x @ mixing + sums(block)).tanh(), block, bias, target)

    def theirs(mixing, table, bias):
        return their_loss((x @ mixing + table.sum(0)).tanh(), table, bias, target)

    inputs = [mixing, blocks[0], bias]
    found = derivatives(ours, inputs, [cotangents[0], blocks[1], cotangents[2]])
    expected = derivatives(theirs, [mixing, table, bias], cotangents)
    cut = [own_part(e, gang, kind) if e.shape == table.shape else e for e in expected]
    torch.testing.assert_close(found, cut)


@per_size
@per_way
def test_second_derivatives_of_a_tied_head(pool, size, kind, way):
    pool(size, tied, kind, way)


def transforms(gang, kind, way, options):
    x, table, bias, _, target = problem()
    ours, theirs = both(gang, kind, way, options)
    inputs, tangents = (x, table, bias), tuple(map(torch.ones_like, (x, table, bias)))
    tables, biases = torch.stack([table, 2 * table]), torch.stack([bias, -bias])
    rows, no_targets = x.expand(4, N, E).clone(), (0, None, None, None)
    rows[1:] *= 2
    targets = torch.stack([target.roll(i) for i in range(4)])

    def forward(loss):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
            return tuple(forward_ad.unpack_dual(loss(*duals, target)))

    found, expected = [], []
    for loss, results in ((ours, found), (theirs, expected)):
        fixed = lambda *i, loss=loss: loss(*i, target)  # noqa: E731
        results += grad(fixed, (0, 1, 2))(*inputs)
        results += vjp(fixed, *inputs)[1](torch.tensor(2.0, dtype=torch.float64))
        results += jvp(fixed, inputs, tangents)
        results += jacfwd(fixed, (0, 1, 2))(*inputs)
        results += jacrev(fixed, (0, 1, 2))(*inputs)
        results += hessian(fixed, (0, 1, 2))(*inputs)[1]
        results += [vmap(loss, no_targets)(rows, *inputs[1:], target)]
        results += [vmap(loss, (0, None, None, 0))(rows, *inputs[1:], targets)]
        results += [vmap(loss, (None, 0, 0, None))(x, tables, biases, target)]
        results += [vmap(grad(loss, 1), (0, None, None, 0))(rows, *inputs[1:], targets)]
        results += forward(loss)
    torch.testing.assert_close(found, expected)


@per_size
@per_way
def test_transforms_of_torch_func(pool, size, kind, way):
    for options in (OPTIONS[0], {**ALL, "reduction": "mean"}):
        pool(size, transforms, kind, way, options)
