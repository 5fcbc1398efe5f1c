"""Second derivatives, transforms and graphs of the values of tokens, in comparison with torch."""

from __future__ import annotations

import pytest
import torch
from test_derivatives import E, V, derivatives, own_part
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from loss_problems import capped
from parity import SHARDED
from token_problems import WAYS, problem
from tp_embed import FakeGang, OutputHead
from tp_embed.parameter.sharded import local

per_kind = pytest.mark.parametrize("kind", sorted(SHARDED))
per_way = pytest.mark.parametrize("way", WAYS)
per_size = pytest.mark.parametrize("size", [1, 2, 3])
CAP = 1.5


def both(gang, kind, way):
    """Returns our values and torch's, as functions of replicated inputs, and these."""
    ours, theirs, has_temperature = WAYS[way]
    (table, bias, x), teacher, target = problem(V, dim=E)
    target = target.clamp_min(0) if "ignore_index" in str(ours) else target
    options = {"temperature": 0.7} if has_temperature else {}
    scale = 0.7 if has_temperature else 1.0
    inputs = [t.detach().flatten(0, -2) if t is x else t.detach() for t in (x, table.weight, bias)]
    inputs[0], target = inputs[0][1:5], target.flatten()[1:5]
    teacher_x = teacher[2].flatten(0, -2)[1:5]
    embeds = [SHARDED[kind].from_embedding(t, gang) for t in (table, teacher[0])]
    heads = [
        OutputHead(embed, bias=b, soft_cap=CAP)
        for embed, b in zip(embeds, (bias, teacher[1]), strict=True)
    ]
    teacher_logits = nn.functional.linear(teacher_x, teacher[0].weight, teacher[1]).detach()
    teacher_logits = capped(teacher_logits, CAP) / scale

    teacher_block = local(heads[1].weight)

    class Values(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.teacher = heads

        def forward(self, x):
            return ours(self.head, x, (teacher_x, self.teacher), target, **options)

    def our_values(x, table, bias):
        tensors = {
            "head.weight": own_part(table, gang, kind),
            "head.bias": bias,
            # Graphs take no shards as constants.
            "teacher.weight": teacher_block,
        }
        return functional_call(Values(), tensors, (x,))

    def their_values(x, table, bias):
        logits = capped(nn.functional.linear(x, table, bias), CAP) / scale
        return theirs(logits, teacher_logits, target)

    return our_values, their_values, inputs


def squares(values):
    return lambda *inputs: values(*inputs).square().sum()


def second_derivatives(gang, kind, way):
    ours, theirs, inputs = both(gang, kind, way)
    cotangents = [torch.randn_like(tensor) for tensor in inputs]
    found, expected = (derivatives(squares(f), inputs, cotangents) for f in (ours, theirs))
    torch.testing.assert_close(found, expected)


@per_kind
@per_way
def test_second_derivatives_are_those_of_torch(pool, way, kind):
    for size in (1, 2, 3):
        pool(size, second_derivatives, kind, way)


def check_gradients(gang, kind, way):
    ours, _, inputs = both(gang, kind, way)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert gradcheck(ours, inputs)
    assert gradgradcheck(ours, inputs)


@pytest.mark.parametrize("way", ["log-probs", "entropy", "reverse divergence", "top k"])
def test_gradcheck(pool, way):
    pool(2, check_gradients, "vocab", way)


def transforms(gang, kind, way):
    ours, theirs, inputs = both(gang, kind, way)
    tangents = tuple(map(torch.ones_like, inputs))
    rows = torch.stack([inputs[0], 2 * inputs[0], -inputs[0]])
    results = []
    for values in (ours, theirs):
        found = [*grad(squares(values), (0, 1, 2))(*inputs)]
        found += jvp(values, tuple(inputs), tangents)
        found += jacrev(values, (0, 1, 2))(*inputs)
        found += hessian(squares(values), (0, 2))(*inputs)[0]
        found += [vmap(values, (0, None, None))(rows, *inputs[1:])]
        found += [vmap(grad(squares(values), 1), (0, None, None))(rows, *inputs[1:])]
        results.append(found)
    torch.testing.assert_close(*results)


@per_kind
@per_way
def test_transforms_of_torch_func(pool, way, kind):
    for size in (1, 2):
        pool(size, transforms, kind, way)


def batched(gang, kind, way):
    """Several gradients at once."""
    ours, theirs, inputs = both(gang, kind, way)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    results = []
    for values in (ours, theirs):
        output = values(*inputs)
        grads = torch.stack([torch.ones_like(output), output.detach()])
        results.append(torch.autograd.grad(output, inputs[:1], grads, is_grads_batched=True))
    torch.testing.assert_close(*results)


@per_way
def test_batched_gradients(way):
    batched(FakeGang("cpu"), "vocab", way)


def batched_over_ranks(gang, kind):
    ours, _, inputs = both(gang, kind, "entropy")
    output = ours(*[tensor.requires_grad_() for tensor in inputs])
    grads = torch.stack([torch.ones_like(output), output.detach()])
    with pytest.raises(ValueError, match="`is_grads_batched` must be False where"):
        torch.autograd.grad(output, inputs[:1], grads, is_grads_batched=True)


@per_kind
def test_batched_gradients_over_ranks_are_refused(pool, kind):
    pool(2, batched_over_ranks, kind)


def graphs(gang, kind, way):
    ours, theirs, inputs = both(gang, kind, way)
    expected = theirs(*inputs), *grad(squares(theirs), (0, 1, 2))(*inputs)

    def step(*inputs):
        return ours(*inputs), *grad(squares(ours), (0, 1, 2))(*inputs)

    graph = make_fx(step)(*inputs)
    torch.testing.assert_close(graph(*inputs), expected)


@per_kind
@per_way
def test_graphs_of_make_fx(pool, way, kind):
    for size in (1, 2):
        pool(size, graphs, kind, way)


def test_the_compiler_leaves_them_as_they_are():
    torch.manual_seed(0)
    head = OutputHead(SHARDED["vocab"](FakeGang("cpu"), V, E))
    x, target = torch.randn(3, E), torch.tensor([1, 2, 3])

    def step(x):
        values, _ = head.top_k(x * 2, 2)
        return head.log_probs(x * 2, target) + head.entropy(x * 2) + values.sum(-1)

    torch.testing.assert_close(torch.compile(step, backend="eager")(x), step(x))


def test_targets_that_change_before_the_backward_are_told():
    head = OutputHead(SHARDED["vocab"](FakeGang("cpu"), V, E))
    target = torch.tensor([1, 2, 3])
    log_probs = head.log_probs(torch.randn(3, E), target)
    target += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()
