"""Heads and losses in graphs, with in-place changes of their outputs, under autocast and other
defaults, and with saved-tensor hooks."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from test_derivatives import E, N, V, both, per_size, per_way, problem
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from parity import SHARDED, whole
from tp_embed import FakeGang, OutputHead, Partition, StandardEmbedding
from tp_embed.nn.loss import cross_entropy, linear_cross_entropy

OPTIONS = {"ignore_index": 2, "label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": 2.0}
per_kind = pytest.mark.parametrize("kind", sorted(SHARDED))


def graphs(gang, kind, way):
    *inputs, _, target = problem()
    ours, theirs = both(gang, kind, way, OPTIONS)
    expected = theirs(*inputs, target), *grad(theirs, (0, 1, 2))(*inputs, target)

    def step(x, table, bias, target):
        return ours(x, table, bias, target), *grad(ours, (0, 1, 2))(x, table, bias, target)

    for mode in ("real", "symbolic", "fake"):
        graph = make_fx(step, tracing_mode=mode)(*inputs, target)
        torch.testing.assert_close(graph(*inputs, target), expected)
        if mode != "symbolic":
            # torch's own loss, if the head returns all logits.
            errors = (RuntimeError, IndexError)
            with pytest.raises(errors, match=r"All of `target` must be in|is out of bounds"):
                graph(*inputs, target + V)
    with FakeTensorMode() as fake:
        fakes = [fake.from_tensor(t) for t in inputs]
        found = ours(*(t.requires_grad_() for t in fakes), fake.from_tensor(target))
        found.backward()
    assert [t.grad.shape for t in fakes] == [t.shape for t in inputs]
    metas = [t.to("meta").requires_grad_() for t in inputs]
    ours(*metas, target.to("meta")).backward()
    assert [t.grad.shape for t in metas] == [t.shape for t in inputs]


@per_size
@per_way
def test_graphs_and_tensors_without_memory(pool, size, kind, way):
    pool(size, graphs, kind, way)


def compile_loss(gang):
    *inputs, _, target = problem()
    partition = Partition(V, gang.size)
    for options in ({}, OPTIONS):
        torch._dynamo.reset()
        own = partition.shard(gang.rank)
        logits = nn.functional.linear(*inputs)[:, own.start : own.stop]
        results = []
        for compiled in (False, True):

            def loss(logits, target, options=options):
                return cross_entropy(logits, target, gang, partition, **options)

            if compiled:
                loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, target)
            (first,) = torch.autograd.grad(value, leaf)
            results.append((value.detach(), first))
        torch.testing.assert_close(*results)


@per_size
def test_a_loss_in_one_graph_of_the_compiler(pool, size):
    pool(size, compile_loss)


def test_targets_out_of_range_under_vmap():
    logits, alone = torch.randn(2, 3, V), (FakeGang("cpu"), Partition(V, 1))
    targets = torch.tensor([[0, 1, 2], [3, V, 5]])
    with pytest.raises(IndexError, match=rf"in \[0, {V}\) or -100 .*, but token 4 has {V} instead"):
        vmap(lambda logits, target: cross_entropy(logits, target, *alone))(logits, targets)


def write_to_outputs(gang, kind, num_classes, shape, bias):
    torch.manual_seed(2)
    table = StandardEmbedding(num_classes, 6, dtype=torch.float64)
    bias = nn.Parameter(torch.randn(num_classes, dtype=torch.float64)) if bias else None
    x = torch.randn(*shape, 6, dtype=torch.float64)
    embed = SHARDED[kind].from_embedding(table, gang)
    heads = [OutputHead(embed, bias=bias), OutputHead(embed, bias=bias, soft_cap=3.0)]

    def write(logits):
        logits.div_(2.0)
        logits += 1
        logits[..., 0] = -torch.inf
        logits[logits > 1.5] = 0.0
        return logits.softmax(-1).square().sum()

    for head in heads:
        results = []
        for ours in (False, True):
            hidden = x.clone().requires_grad_()
            logits = nn.functional.linear(hidden, table.weight, bias)
            if head.soft_cap is not None:
                logits = head.soft_cap * (logits / head.soft_cap).tanh()
            logits = head(hidden) if ours else logits
            weight = embed.weight if ours else table.weight
            inputs = [hidden, weight] + ([] if bias is None else [bias])
            gradients = list(torch.autograd.grad(write(logits), inputs))
            gradients[1] = whole(embed, gradients[1]) if ours else gradients[1]
            results.append([logits.detach(), *gradients])
            assert torch.equal(hidden, x)
        torch.testing.assert_close(*results)


@per_kind
@pytest.mark.parametrize("bias", [False, True])
@per_size
def test_outputs_can_be_written_to(pool, size, kind, bias):
    """Also with even blocks, one token, and one column over all ranks."""
    for num_classes, shape in [(12, (2, 3)), (11, (2, 3)), (12, (1,)), (11, (1, 1)), (12, ())]:
        pool(size, write_to_outputs, kind, num_classes, shape, bias)


def under_autocast(gang, kind, output):
    torch.manual_seed(2)
    table = StandardEmbedding(12, 8)
    bias, x = nn.Parameter(torch.randn(12)), torch.randn(2, 3, 8)
    target = torch.randint(12, (2, 3))
    embed = SHARDED[kind].from_embedding(table, gang)
    head = OutputHead(embed, bias=bias, output=output)
    own = slice(None)
    if output == "shard":
        own = slice(embed.rows.start, embed.rows.stop)
    hidden = [x.clone().requires_grad_() for _ in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.functional.linear(hidden[0], table.weight, bias)
        loss = nn.functional.cross_entropy(expected.flatten(0, 1), target.flatten())
        logits = head(hidden[1])
        our_loss = head.loss(hidden[2], target)
        our_other = loss
        if output == "shard":
            our_other = cross_entropy(head(hidden[3]), target, gang, embed.partition)
    assert (
        (logits.dtype, our_loss.dtype)
        == (expected.dtype, loss.dtype)
        == (torch.bfloat16, torch.float32)
    )
    torch.testing.assert_close(logits, expected[..., own], atol=0.02, rtol=0.02)
    for found in (our_loss, our_other):
        torch.testing.assert_close(found, loss, atol=0.01, rtol=0.01)
    if gang.size == 1:
        assert torch.equal(logits, expected)
    (theirs,) = torch.autograd.grad(loss, hidden[0], retain_graph=True)
    (ours,) = torch.autograd.grad(our_loss, hidden[2])
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0.03)
    gradients = torch.autograd.grad(expected[..., own].sum(), [hidden[0], table.weight, bias])
    found = list(torch.autograd.grad(logits.sum(), [hidden[1], embed.weight, bias]))
    if output == "replicated":
        found[1] = whole(embed, found[1])
        assert [g.dtype for g in found] == [g.dtype for g in gradients]
        torch.testing.assert_close(found, list(gradients), atol=0.05, rtol=0.02)


@per_size
@pytest.mark.parametrize(
    ("kind", "output"), [("vocab", "replicated"), ("vocab", "shard"), ("embed", "replicated")]
)
def test_autocast_of_a_head_with_a_bias(pool, size, kind, output):
    pool(size, under_autocast, kind, output)


def run_all(options, dtype):
    generator = torch.Generator("cpu").manual_seed(3)
    draw = {"dtype": dtype, "generator": generator, "device": "cpu"}
    x, weight, bias = (torch.randn(*s, **draw).requires_grad_() for s in ((N, E), (V, E), (V,)))
    target = torch.tensor([1, 6, 2, 3, 4], device="cpu")
    alone = FakeGang("cpu"), Partition(V, 1)
    logits = nn.functional.linear(x, weight, bias)
    results = []
    for loss in (
        cross_entropy(logits, target, *alone, **options),
        linear_cross_entropy(x, weight, target, *alone, bias=bias, **options),
    ):
        plain = torch.autograd.grad(loss, [x, weight, bias], retain_graph=True)
        first = torch.autograd.grad(loss, [x, weight, bias], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, weight, bias])
        results += [loss, *first, *second, *plain]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=str)
def test_defaults_of_torch_change_nothing(dtype, options):
    expected = run_all(options, dtype)
    try:
        for default in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(default)
            for ours, theirs in zip(run_all(options, dtype), expected, strict=True):
                assert torch.equal(ours, theirs)
        torch.set_default_device("meta")
        for ours, theirs in zip(run_all(options, dtype), expected, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_loss_keeps_logits_only_for_a_cap(soft_cap):
    kept, logits = [], torch.randn(N, V, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alone = FakeGang("cpu"), Partition(V, 1)
        loss = cross_entropy(logits, torch.arange(N), *alone, soft_cap=soft_cap)
    assert sum(t.numel() == logits.numel() for t in kept) == 1 + (soft_cap is not None)
    assert sum(t.data_ptr() == logits.data_ptr() for t in kept) == (soft_cap is not None)
    if soft_cap is None:  # As in torch, which saves the result of `log_softmax()`.
        with torch.no_grad():
            logits.zero_()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["x", "weight", "target"])
def test_inputs_that_were_changed_in_place_are_refused(name):
    inputs = {"x": torch.randn(N, E), "weight": torch.randn(V, E), "target": torch.arange(N)}
    for kept in ("x", "weight"):
        inputs[kept].requires_grad_()
    for fused in (True, False):
        if fused:
            loss = linear_cross_entropy(**inputs, gang=FakeGang("cpu"), partition=Partition(V, 1))
        else:
            logits = nn.functional.linear(inputs["x"], inputs["weight"])
            loss = cross_entropy(logits, inputs["target"], FakeGang("cpu"), Partition(V, 1))
        with torch.no_grad():
            inputs[name].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hooks_see_all_that_the_fused_loss_keeps():
    x, weight = torch.randn(N, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    seen, arguments = [], (torch.arange(N), FakeGang("cpu"), Partition(V, 1))
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, *arguments)
    shapes = [tuple(t.shape) for t in seen]
    assert shapes.count((N, E)) == 2  # The hidden states and their gradient.
    assert shapes.count((V, E)) == 2
    with save_on_cpu():
        loss = linear_cross_entropy(x, weight, *arguments)
    first = torch.autograd.grad(loss, [x, weight], create_graph=True)
    plain = nn.functional.cross_entropy(nn.functional.linear(x, weight), arguments[0])
    expected = torch.autograd.grad(plain, [x, weight], create_graph=True)
    torch.testing.assert_close(first, expected)
    products = []
    for gradients in (first, expected):
        x.grad = None
        sum(g.square().sum() for g in gradients).backward(inputs=[x])
        products.append(x.grad)
    torch.testing.assert_close(*products)
