"""What a loss computes, holds and sends."""

from __future__ import annotations

import pytest
import torch
from torch import is_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loss_problems import E, V, problem
from tp_embed import FakeGang, OutputHead, Partition, ShardedEmbedding
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.nn import fused_loss, projection
from tp_embed.nn.loss import cross_entropy, linear_cross_entropy


class Seen(TorchDispatchMode):
    """Sees the number of items and bytes of the largest tensor that an operation makes, the names
    of operations, and the number of multiplications in products of matrices."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.nbytes = 0
        self.multiplications = 0
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("mm", "addmm", "addmm_"):
            self.multiplications += output.numel() * args[-1].size(0)
        for tensor in tree_leaves(output):
            if is_tensor(tensor) and tensor.untyped_storage()._cdata not in known:
                self.numel = max(self.numel, tensor.numel())
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return output


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias", "x weight", "x weight bias"])
def test_gradients_are_not_computed_where_none_is_needed(monkeypatch, frozen, grad_mode):
    classes, tokens = 500, 8
    monkeypatch.setattr(fused_loss, "_CHUNK_BYTES", 4 * classes * 2)
    monkeypatch.setattr(fused_loss, "_MIN_TOKENS", 1)
    x, weight, bias = torch.randn(tokens, E), torch.randn(classes, E), torch.randn(classes)
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        tensor.requires_grad_(name not in frozen.split())
    target, alone = torch.arange(tokens), (FakeGang("cpu"), Partition(classes, 1))
    with grad_mode(), Seen() as seen:
        loss = linear_cross_entropy(x, weight, target, *alone, bias=bias, soft_cap=3.0)
    needed = [t for t in (x, weight, bias) if t.requires_grad and grad_mode is torch.enable_grad]
    products = 1 + sum(t is not bias for t in needed)
    assert seen.multiplications == products * tokens * classes * E
    largest = weight.numel() if any(t is weight for t in needed) else 2 * 2 * classes
    assert seen.numel <= max(largest, classes)
    assert ("scatter_add_" in seen.names) == bool(needed)
    assert loss.requires_grad == bool(needed)
    if needed:
        loss.backward()
    assert [t.grad is not None for t in (x, weight, bias)] == [
        any(t is n for n in needed) for t in (x, weight, bias)
    ]


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_gradients_of_logits_are_not_computed_where_none_is_needed(grad_mode):
    logits = torch.randn(3, V, requires_grad=True)
    target, alone = torch.arange(3), (FakeGang("cpu"), Partition(V, 1))
    with grad_mode(), Seen() as seen:
        cross_entropy(logits, target, *alone)
    assert ("scatter_add_" in seen.names) == (grad_mode is torch.enable_grad)
    with Seen() as seen:
        cross_entropy(logits.detach(), target, *alone)
    assert "scatter_add_" not in seen.names


def test_ignored_tokens_take_no_work():
    x, weight = torch.randn(6, E), torch.randn(V, E)
    target = torch.tensor([-100, 3, -100, -100, 4, -100])
    with Seen() as seen:
        linear_cross_entropy(x, weight, target, FakeGang("cpu"), Partition(V, 1))
    assert seen.multiplications == 2 * V * E


def test_fused_loss_holds_no_logits(monkeypatch):
    tokens, classes, dim = 4096, 1024, 8
    monkeypatch.setattr(fused_loss, "_CHUNK_BYTES", 64 * classes * 4)
    x = torch.randn(tokens, dim, requires_grad=True)
    weight = torch.randn(classes, dim, requires_grad=True)
    target = torch.randint(classes, (tokens,))
    alone, partition = FakeGang("cpu"), Partition(classes, 1)
    with Seen() as fused:
        linear_cross_entropy(x, weight, target, alone, partition).backward()
    with Seen() as plain:
        functional.cross_entropy(functional.linear(x, weight), target).backward()
    assert plain.numel == tokens * classes
    assert fused.numel == 64 * classes


@pytest.mark.parametrize(
    ("dtype", "options", "twice"),
    [
        (torch.float32, {}, 0),
        (torch.bfloat16, {}, 320),
        (torch.bfloat16, {"accum_dtype": torch.float32}, 0),
        (torch.bfloat16, {"soft_cap": 5.0}, 448),
    ],
)
def test_logits_wait_in_the_memory_of_the_gradient(monkeypatch, dtype, options, twice):
    """The gradient is the largest tensor. Logits of tokens that don't fit are computed twice, where
    gradients of chunks can't be added without rounding each sum."""
    there = next(name for name, able in torch.cpu.get_capabilities().items() if able is True)
    monkeypatch.setattr(projection, "_CPU_PRODUCTS", {torch.bfloat16: (there,)})
    tokens, classes, dim = 512, 4096, 256
    x = torch.randn(tokens, dim).to(dtype).requires_grad_()
    weight = torch.randn(classes, dim).to(dtype).requires_grad_()
    arguments = torch.randint(classes, (tokens,)), FakeGang("cpu"), Partition(classes, 1)
    with Seen() as seen:
        linear_cross_entropy(x, weight, *arguments, **options).backward()
    assert seen.multiplications == (3 * tokens + twice) * classes * dim
    assert seen.nbytes == weight.numel() * (options.get("accum_dtype") or dtype).itemsize


@pytest.mark.parametrize("fused", [False, True])
def test_backward_makes_no_other_gradient(fused):
    """The saved gradient becomes the tensor's own, unless it is needed again."""
    x, weight = torch.randn(4, E), torch.randn(V, E, requires_grad=True)
    logits = torch.randn(4, V, requires_grad=True)
    target, alone = torch.arange(4), (FakeGang("cpu"), Partition(V, 1))
    if fused:
        leaf, loss = weight, linear_cross_entropy(x, weight, target, *alone)
    else:
        leaf, loss = logits, cross_entropy(logits, target, *alone)
    whole_logits = functional.linear(x, leaf) if fused else leaf
    (expected,) = torch.autograd.grad(functional.cross_entropy(whole_logits, target), leaf)
    for times in (1, 2):
        loss.backward(torch.tensor(2.0), retain_graph=True)
        torch.testing.assert_close(leaf.grad, times * 2 * expected)
    leaf.grad = None
    with Seen() as seen:
        loss.backward(torch.tensor(3.0))
    torch.testing.assert_close(leaf.grad, 3 * expected)
    assert seen.numel < leaf.numel()


def volumes(gang, kind, dtype):
    table, _, x, target = problem(V, dtype)
    head = OutputHead(kind.from_embedding(table, gang))
    with CommDebugMode() as forward:
        loss = head.loss(x, target)
    with CommDebugMode() as backward:
        loss.backward()
    return [{str(n): c for n, c in mode.get_comm_counts().items()} for mode in (forward, backward)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_sends_what_it_says(pool, dtype):
    gather, reduce = "c10d._allgather_base_", "c10d.allreduce_"
    assert pool(2, volumes, VocabSharded, dtype)[0] == [{gather: 1}, {reduce: 1}]
    assert pool(2, volumes, ShardedEmbedding, dtype)[0] == [{reduce: 1}, {gather: 1}]
