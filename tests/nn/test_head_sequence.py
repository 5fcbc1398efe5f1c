"""Compares heads that take the hidden states of this rank's positions with ``torch.nn.Linear`` of
all positions in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loss_problems import expected_loss
from parity import whole
from tp_embed import (
    FakeGang,
    OutputHead,
    Partition,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.gang.collectives import gather_positions, positions_to_columns
from tp_embed.nn.loss import cross_entropy
from tp_embed.nn.sequence import mean_over_sequence

KINDS = [VocabShardedEmbedding, ShardedEmbedding]
V, E = 11, 7
# (2, 1): with three ranks, the last ones hold no position.
SHAPES = [(2, 6), (2, 5), (3, 4), (7,), (2, 1), (2, 0)]


def own(x, gang, dim):
    block = Partition(x.size(dim), gang.size).shard(gang.rank)
    return x.narrow(dim, block.start, len(block))


def problem(shape, dtype=torch.float64):
    torch.manual_seed(3)
    table = StandardEmbedding(V, E, dtype=dtype)
    bias = nn.Parameter(torch.randn(V, dtype=dtype))
    x = torch.randn(*shape, E, dtype=dtype, requires_grad=True)
    target = torch.randint(V, shape)
    target.flatten()[1:2] = -100
    return table, bias, x, target


def forward_is_linear(gang, kind, shape):
    table, bias, x, _ = problem(shape)
    expected = nn.functional.linear(x, table.weight, bias)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, table.weight, bias], upstream)
    embed = kind.from_embedding(table, gang)
    head = OutputHead(embed, bias=bias, input="sequence")
    for length in (None, shape[-1]):
        mine = own(x, gang, -2).detach().requires_grad_()
        logits = head(mine, length)
        torch.testing.assert_close(logits, expected)
        grads = torch.autograd.grad(logits, [mine, embed.weight, bias], upstream)
        torch.testing.assert_close(grads[0], own(wanted[0], gang, -2))
        torch.testing.assert_close([whole(embed, grads[1]), grads[2]], list(wanted[1:]))
    with torch.no_grad():
        torch.testing.assert_close(head(own(x, gang, -2)), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_linear_of_all_positions(pool, kind, size):
    for shape in SHAPES:
        pool(size, forward_is_linear, kind, shape)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "ignore_index": 3},
    {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 1.5},
]


def loss_is_that_of_all_positions(gang, kind, shape):
    for options in OPTIONS:
        table, bias, x, target = problem(shape)
        if options.get("ignore_index") is not None:
            target[target == -100] = 3
        expected = expected_loss(
            nn.functional.linear(x, table.weight, bias).flatten(0, -2), target.flatten(), **options
        )
        wanted = torch.autograd.grad(expected, [x, table.weight, bias])
        embed = kind.from_embedding(table, gang)
        head = OutputHead(embed, bias=bias, input="sequence")
        mine = own(x, gang, -2).detach().requires_grad_()
        for labels, length in [(target, None), (own(target, gang, -1), shape[-1])]:
            loss = head.loss(mine, labels, length=length, **options)
            torch.testing.assert_close(loss, expected)
            grads = torch.autograd.grad(loss, [mine, embed.weight, bias])
            torch.testing.assert_close(grads[0], own(wanted[0], gang, -2))
            torch.testing.assert_close([whole(embed, grads[1]), grads[2]], list(wanted[1:]))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_all_positions(pool, kind, size):
    for shape in SHAPES[:-1]:
        pool(size, loss_is_that_of_all_positions, kind, shape)


def losses_of_tokens(gang, shape):
    """Each rank gets the loss of every token, from its classes of all positions."""
    table, bias, x, target = problem(shape)
    logits = nn.functional.linear(x, table.weight, bias)
    expected = nn.functional.cross_entropy(
        logits.flatten(0, -2), target.flatten(), reduction="none"
    ).view(shape)
    weights = torch.rand(shape, dtype=x.dtype)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, table.weight, bias])
    embed = VocabShardedEmbedding.from_embedding(table, gang)
    head = OutputHead(embed, bias=bias, input="sequence", output="shard")
    mine = own(x, gang, -2).detach().requires_grad_()
    losses = cross_entropy(head(mine), target, gang, embed.partition, reduction="none")
    torch.testing.assert_close(losses, expected)
    grads = torch.autograd.grad((losses * weights).sum(), [mine, embed.weight, bias])
    torch.testing.assert_close(grads[0], own(wanted[0], gang, -2))
    torch.testing.assert_close([whole(embed, grads[1]), grads[2]], list(wanted[1:]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_losses_of_tokens_are_those_of_all_positions(pool, size):
    for shape in SHAPES[:-1]:
        pool(size, losses_of_tokens, shape)


def embed_to_loss(gang, kind, steps):
    """Trains a tied table, from ids to the loss, with a layer between that sees single positions.
    Returns the losses and the table."""
    torch.manual_seed(5)
    table, between = StandardEmbedding(V, E), nn.Linear(E, E)
    ids = torch.randint(V, (steps, 2, 6))
    embed = kind.from_embedding(table, gang, output="sequence")
    head = OutputHead(embed, input="sequence")
    parameters = [embed.weight, *between.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for batch in ids:
        loss = head.loss(between(embed(batch[:, :-1])).tanh(), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        for parameter in between.parameters():
            gang.all_reduce(parameter.grad)
        optimizer.step()
        losses.append(loss.item())
    return losses, whole(embed, embed.weight.detach())


def embed_to_loss_alone(steps):
    torch.manual_seed(5)
    table, between = StandardEmbedding(V, E), nn.Linear(E, E)
    ids = torch.randint(V, (steps, 2, 6))
    embed = nn.Embedding(V, E, _weight=table.weight.detach().clone())
    optimizer = torch.optim.SGD([*embed.parameters(), *between.parameters()], lr=0.5)
    losses = []
    for batch in ids:
        logits = between(embed(batch[:, :-1])).tanh() @ embed.weight.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, embed.weight.detach()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_training_from_ids_to_the_loss_is_that_of_one_process(pool, kind, size):
    expected = embed_to_loss_alone(4)
    for losses, table in pool(size, embed_to_loss, kind, 4):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(table, expected[1], rtol=1e-5, atol=1e-5)


def derivatives(gang, kind):
    """Second derivatives of the collectives, forward-mode AD and `vmap`."""
    torch.manual_seed(6)
    positions, columns = Partition(5, gang.size), Partition(E, gang.size)
    x = torch.randn(2, 5, E, dtype=torch.float64)
    mine = own(x, gang, -2).clone().requires_grad_()

    def collective(h):
        if kind is ShardedEmbedding:
            return positions_to_columns(h, gang, positions, columns)
        return gather_positions(h, gang, positions)

    expected = own(x, gang, -1) if kind is ShardedEmbedding else x
    torch.testing.assert_close(collective(mine), expected)
    output, tangent = torch.func.jvp(collective, (mine,), (2 * mine,))
    torch.testing.assert_close([output, tangent], [expected, 2 * expected])
    mapped = torch.func.vmap(collective)(mine.detach())
    torch.testing.assert_close(mapped, expected)
    loss = collective(mine).pow(3).sum()
    (grad,) = torch.autograd.grad(loss, mine, create_graph=True)
    copies = 1 if kind is ShardedEmbedding else gang.size
    torch.testing.assert_close(grad, copies * 3 * mine**2)
    (second,) = torch.autograd.grad(grad.sum(), mine)
    torch.testing.assert_close(second, copies * 6 * mine)
    collective(1 * mine).add_(1)  # The output may be written to.


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_collectives_have_all_derivatives(pool, kind, size):
    pool(size, derivatives, kind)


def compiled(gang, kind):
    table, bias, x, target = problem((2, 5), torch.float32)
    embed = kind.from_embedding(table, gang)
    head = OutputHead(embed, bias=bias, input="sequence")
    for function in (head, lambda h: head(h, 5), lambda h: head.loss(h, target)):
        found = []
        for run in (function, torch.compile(function, backend="aot_eager")):
            mine = own(x, gang, -2).detach().requires_grad_()
            result = run(mine)
            grads = torch.autograd.grad(result.pow(2).sum(), [mine, embed.weight, bias])
            found.append([result, *grads])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager(pool, kind, size):
    pool(size, compiled, kind)


def refusals(gang):
    embed = VocabShardedEmbedding(gang, V, E)
    head = OutputHead(embed, input="sequence")
    with pytest.raises(ValueError, match=r"`x` must hold the 3 positions .* of 6 .*holds 6"):
        head.loss(torch.zeros(2, 6, E), torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`target` must hold the 3 positions .* holds 6"):
        head.loss(torch.zeros(2, 3, E), torch.zeros(2, 6, dtype=torch.long), length=6)
    with pytest.raises(ValueError, match=r"`x` must hold .* pass `length`"):
        head.loss(torch.zeros(2, 3, E), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`x` must have the shape \(\*, positions, E\)"):
        head(torch.zeros(E))
    with pytest.raises(ValueError, match=r"must hold \(2, 2\) positions of 4, .* hold \(1, 3\)"):
        head(torch.zeros(2, 1 + 2 * gang.rank, E))
    with pytest.raises(ValueError, match=r"`target` must have the shape \(\*, positions\)"):
        head.loss(torch.zeros(3, E), torch.tensor(1))
    with pytest.raises(ValueError, match=r"`length` must be None .* `input='sequence'`"):
        OutputHead(embed)(torch.zeros(2, 3, E), 6)
    with pytest.raises(ValueError, match=r"`length` must be None .* `input='sequence'`"):
        OutputHead(embed).loss(torch.zeros(2, 3, E), torch.zeros(2, 3, dtype=torch.long), length=6)


def test_what_would_go_wrong_is_refused(pool):
    pool(2, refusals)
    embed = VocabShardedEmbedding(FakeGang("cpu"), V, E)
    with pytest.raises(ValueError, match=r"`input` must be one of .* but is 'rows' instead"):
        OutputHead(embed, input="rows")
    expected = "OutputHead(rows=0:11, shard=0/1, input='sequence')"
    assert repr(OutputHead(embed, input="sequence")) == expected


def mean_of_all(gang, averaged):
    """Each rank has other tokens; rank 1 has none with a loss."""
    torch.manual_seed(7)
    weight = torch.randn(V, E, dtype=torch.float64, requires_grad=True)
    x = torch.randn(gang.size, 5, E, dtype=torch.float64)
    target = torch.randint(V, (gang.size, 5))
    target[0, 0] = -100
    target[1:2] = -100
    expected = nn.functional.cross_entropy((x @ weight.T).flatten(0, 1), target.flatten())
    (wanted,) = torch.autograd.grad(expected, weight)

    logits, labels = x[gang.rank] @ weight.T, target[gang.rank]
    total = nn.functional.cross_entropy(logits, labels, reduction="sum")
    kept = total.item()
    loss = mean_over_sequence(total, (labels != -100).sum(), gang, averaged=averaged)
    torch.testing.assert_close(loss, expected)
    assert total.item() == kept
    (grad,) = torch.autograd.grad(loss, weight)
    gang.all_reduce(grad)
    torch.testing.assert_close(grad / (gang.size if averaged else 1), wanted)
    no_token = (weight * 0).sum()
    loss = mean_over_sequence(no_token, 0, gang, averaged=averaged)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_mean_over_the_tokens_of_all_ranks(pool, size, averaged):
    pool(size, mean_of_all, averaged)
