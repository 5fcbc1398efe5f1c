"""Compares what models do with deferred logits with the logits of ``torch.nn.Linear``."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import pad_across_processes
from torch import nn
from torch.nn import functional

from loss_problems import V, problem
from parity import SHARDED, whole
from tp_embed import FakeGang, OutputHead, VocabShardedEmbedding
from tp_embed.nn.deferred import DeferredLogits, DeferredLogitsError

MORE = torch.linspace(-1.0, 2.0, V, dtype=torch.float64)


def rows(logits):
    return logits.view(-1, V)


# What models do between head and loss, to logits of the shape (2, 5, V).
USES = {
    "nothing": lambda y, t: functional.cross_entropy(rows(y), t.view(-1)),
    "module": lambda y, t: nn.CrossEntropyLoss(ignore_index=-100)(rows(y), t.view(-1)),
    "keywords": lambda y, t: functional.cross_entropy(input=rows(y), target=t.flatten()),
    "smoothing": lambda y, t: functional.cross_entropy(
        rows(y), t.view(-1), label_smoothing=0.2, reduction="sum"
    ),
    "other ignored": lambda y, t: functional.cross_entropy(
        rows(y), t.masked_fill(t == -100, 3).view(-1), ignore_index=3
    ),
    "divided": lambda y, t: functional.cross_entropy(rows(y / 13.0), t.view(-1)),
    "scaled": lambda y, t: functional.cross_entropy(rows(0.3 * torch.mul(y, 5)), t.view(-1)),
    "negative": lambda y, t: functional.cross_entropy(rows(-y * np.float32(0.5)), t.view(-1)),
    "capped": lambda y, t: functional.cross_entropy(
        rows(torch.tanh(y / 1.5) * 1.5).double(), t.view(-1)
    ),
    "capped, then scaled": lambda y, t: functional.cross_entropy(
        rows((y / 2.5).tanh() * 1.5 / -0.7), t.view(-1)
    ),
    "scaled, then capped": lambda y, t: functional.cross_entropy(
        rows(nn.Tanh()(y * 3 * 0.2)), t.view(-1)
    ),
    "more bias": lambda y, t: functional.cross_entropy(
        rows((y * 2 + MORE[None]) / 3 + MORE), t.view(-1)
    ),
    "bias first": lambda y, t: functional.cross_entropy(rows(MORE + y), t.view(-1)),
    "cast": lambda y, t: functional.cross_entropy(
        y.to(y.device).to(torch.float64).type(torch.float64).type_as(MORE).view(-1, y.shape[-1]),
        t.view(-1),
    ),
    "shifted": lambda y, t: functional.cross_entropy(
        y[..., :-1, :].contiguous().view(-1, y.size(-1)), t[:, 1:].reshape(-1)
    ),
    "indices": lambda y, t: functional.cross_entropy(y[1, 2:], t[1, 2:]),
    "mask": lambda y, t: functional.cross_entropy(y[t > 4], t[t > 4]),
    "mask of classes as they are": lambda y, t: functional.cross_entropy(
        y[..., :V][t > 4, :], t[t > 4]
    ),
    "positions": lambda y, t: functional.cross_entropy(
        y[torch.tensor([0, 1]), torch.tensor([2, 3])], t[[0, 1], [2, 3]]
    ),
    "one token": lambda y, t: functional.cross_entropy(y[1, 2, ...], t[1, 2]),
    "flattened": lambda y, t: functional.cross_entropy(y.flatten(0, 1), t.flatten()),
    "flat by torch": lambda y, t: functional.cross_entropy(
        torch.flatten(y.transpose(0, 1), end_dim=-2), t.t().flatten()
    ),
    "reshaped": lambda y, t: functional.cross_entropy(
        torch.reshape(y, (10, -1)), t.reshape(torch.Size([10]))
    ),
    "each token": lambda y, t: functional.cross_entropy(
        rows(y), t.view(-1), reduction="none"
    ).sin(),
    "each token, scaled": lambda y, t: functional.cross_entropy(
        rows(y * -0.7), t.view(-1), reduction="none", label_smoothing=0.1
    ).sin(),
    "weighted": lambda y, t: nn.CrossEntropyLoss(MORE.abs())(rows(y / 3), t.view(-1)),
    "weighted, capped": lambda y, t: functional.cross_entropy(
        rows(torch.tanh(y / 1.5) * -2), t.view(-1), weight=MORE.abs(), reduction="sum"
    ),
    "several": lambda y, t: sum(functional.cross_entropy(y[i], t[i]) for i in range(len(y))),
}


def check_uses(gang, strategy, soft_cap, has_bias):
    table, bias, x, target = problem(V)
    bias = bias if has_bias else None
    embed = SHARDED[strategy].from_embedding(table, gang)
    head = OutputHead(embed, bias=bias, soft_cap=soft_cap, output="deferred")
    inputs = [x, table.weight] + [bias] * has_bias
    for name, use in USES.items():
        logits = functional.linear(x, table.weight, bias)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        if (soft_cap is not None and "cap" in name) or ("bias" in name and soft_cap is not None):
            with pytest.raises(DeferredLogitsError, match=r"`(tanh|add)` needs the values"):
                use(head(x), target)
            continue
        expected = use(logits, target).sum()
        wanted = torch.autograd.grad(expected, inputs)
        found = use(head(x), target).sum()
        torch.testing.assert_close(found, expected, msg=name)
        grads = torch.autograd.grad(found, [x, embed.weight] + [bias] * has_bias)
        ours = [grads[0], whole(embed, grads[1]), *grads[2:]]
        torch.testing.assert_close(ours, list(wanted), msg=name)


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_uses_of_logits_have_the_loss_and_gradients_of_linear(pool, size, strategy):
    pool(size, check_uses, strategy, None, False)
    pool(size, check_uses, strategy, 0.9, True)
    pool(size, check_uses, strategy, None, True)


def bias_with_a_gradient(gang):
    table, bias, x, target = problem(V)
    more = MORE.clone().requires_grad_()
    logits = functional.linear(x, table.weight, bias) / 4 + more
    expected = functional.cross_entropy(rows(logits), target.view(-1))
    wanted = torch.autograd.grad(expected, [x, bias, more])
    embed = VocabShardedEmbedding.from_embedding(table, gang)
    found = rows(OutputHead(embed, bias=bias, output="deferred")(x) / 4 + more)
    grads = torch.autograd.grad(functional.cross_entropy(found, target.view(-1)), [x, bias, more])
    torch.testing.assert_close(grads, wanted)


def test_a_bias_that_is_added_gets_its_gradient(pool):
    pool(1, bias_with_a_gradient)
    pool(3, bias_with_a_gradient)


def test_dtypes_are_those_of_logits_and_are_not_rounded():
    embed = VocabShardedEmbedding(FakeGang("cpu"), V, 6, dtype=torch.bfloat16)
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    logits = OutputHead(embed, output="deferred")(x)
    assert (logits.dtype, logits.float().dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert OutputHead(embed, output="deferred")(x.float()).dtype == torch.float16
    assert logits.shape == logits.size() == (4, V)
    assert (logits.ndim, logits.dim(), len(logits), logits.numel()) == (2, 2, 4, 4 * V)
    assert (logits.device, logits.requires_grad) == (x.device, True)
    assert repr(logits) == f"DeferredLogits(shape=(4, {V}), dtype=torch.bfloat16)"
    target = torch.tensor([1, 2, 3, -100])
    exact = functional.linear(x.double(), embed.weight.double()) / 7
    expected = functional.cross_entropy(exact, target)
    loss = functional.cross_entropy(logits / 7, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-4)


# What needs values, or is not what the loss would compute.
MISUSES = {
    "detach": lambda y: y.detach(),
    "softmax": lambda y: torch.softmax(y, -1),
    "log_softmax": lambda y: functional.log_softmax(y, dim=-1),
    "argmax": lambda y: y.argmax(-1),
    "where": lambda y: torch.where(torch.tensor(True), y, torch.zeros(V)),
    "cat": lambda y: torch.cat([y, y]),
    "copy_": lambda y: torch.zeros(y.shape).copy_(y),
    "sub": lambda y: torch.ones(V) - y,
    "__setitem__": lambda y: y.__setitem__(0, 1.0),
    "__eq__": lambda y: y == 0,
    "__bool__": bool,
    "__array__": np.asarray,
    "__reduce_ex__": pickle.dumps,
    "__deepcopy__|__reduce_ex__": copy.deepcopy,
    "__imul__": lambda y: exec("y *= 2", {"y": y}),
    "mul by Tensor": lambda y: y * torch.ones(V),
    "mul by float": lambda y: y * float("nan"),
    "div by int": lambda y: y / 0,
    "div": lambda y: torch.div(y, 2, rounding_mode="floor"),
    "__rtruediv__": lambda y: 2 / y,
    "add": lambda y: y + 1,
    "add ": lambda y: y + torch.ones(10, V),
    "tanh": lambda y: y.tanh().tanh(),
    "to": lambda y: y.to(torch.int64),
    "to ": lambda y: y.to("meta"),
    "view": lambda y: y.view(-1),
    "transpose": lambda y: y.transpose(0, 1),
    "indexing of classes": lambda y: y[..., 0],
    "indexing of classes ": lambda y: y[:, : V - 1],
    "indexing of classes  ": lambda y: y[..., None],
    "indexing of classes   ": lambda y: y[0, 1, ...],
    "indexing of classes    ": lambda y: y[torch.ones(10, V, dtype=torch.bool)],
    "cross_entropy.reduce=": lambda y: functional.cross_entropy(y, torch.arange(10), reduce=False),
    "probabilities of classes": lambda y: functional.cross_entropy(y, torch.ones(10, V) / V),
    "classes in the second": lambda y: functional.cross_entropy(y[None], torch.ones(1, V).long()),
}


def logits_of_ten_tokens():
    embed = VocabShardedEmbedding(FakeGang("cpu", rank=1, size=3), V, 6)
    return OutputHead(embed, output="deferred")(torch.randn(10, 6))


@pytest.mark.parametrize("name", MISUSES)
def test_what_needs_values_is_refused(name):
    with pytest.raises(DeferredLogitsError, match=name.strip()) as raised:
        MISUSES[name](logits_of_ten_tokens())
    assert "call `model.eval()`, or turn off `fuse_loss`" in str(raised.value)
    assert isinstance(raised.value, TypeError)


def test_libraries_that_print_the_type_name_the_fix():
    # Accelerate does so when it gathers what a model returned.
    logits = logits_of_ten_tokens()
    with pytest.raises(TypeError, match=r"Unsupported types .*DeferredLogits.*pass True"):
        pad_across_processes({"logits": logits})


def test_what_would_fail_for_logits_fails():
    logits = logits_of_ten_tokens()
    assert isinstance(logits, DeferredLogits)
    assert not torch.is_tensor(logits)
    assert not hasattr(logits, "detach")
    with pytest.raises(RuntimeError, match=r"shape '\[-1, 7\]' is invalid"):
        logits.view(-1, 7)
    with pytest.raises(IndexError):
        logits[10]
    with pytest.raises(ValueError, match=r"`target` must have the shape \(10,\)"):
        functional.cross_entropy(logits, torch.arange(9))
    with pytest.raises(IndexError, match=r"All of `target` must be in \[0, 11\)"):
        functional.cross_entropy(logits, torch.full((10,), V))
    with pytest.raises(TypeError, match="must have an integer dtype"):
        functional.cross_entropy(logits, torch.ones(10, V)[:, 0])


def test_logits_of_values_that_have_changed_are_refused():
    embed = VocabShardedEmbedding(FakeGang("cpu"), V, 6)
    head, target = OutputHead(embed, output="deferred"), torch.arange(10)

    def logits():
        return head(x := torch.randn(10, 6)), x

    message = "must be used before `backward\\(\\)`, and before their hidden states or the weight"
    late, _ = logits()
    functional.cross_entropy(head(torch.randn(10, 6)), target).backward()
    functional.cross_entropy(late[:5].float(), target[:5])
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    with pytest.raises(DeferredLogitsError, match=message):
        functional.cross_entropy(late, target)
    later, x = logits()
    some = later[:5] / 2
    x += 1
    for wrong in (later, some):
        with pytest.raises(DeferredLogitsError, match=message):
            functional.cross_entropy(wrong, target[: len(wrong)])
    with pytest.raises(DeferredLogitsError, match=message):
        _ = later[2:]
    copied, x = logits()
    some = copied[torch.arange(10) > 4]
    x.zero_()
    functional.cross_entropy(some, target[5:])
    other = {"weight": head.weight.detach() + 1}
    outside = torch.func.functional_call(head, other, (torch.randn(10, 6),))
    with pytest.raises(DeferredLogitsError, match=message):
        functional.cross_entropy(outside, target)
    x = torch.randn(10, 6, requires_grad=True)
    spent = head(x)
    functional.cross_entropy(spent, target).backward()
    with pytest.raises(DeferredLogitsError, match=message):  # At ZeRO, a step may follow.
        functional.cross_entropy(spent, target)
    with torch.inference_mode():
        functional.cross_entropy(logits()[0], target)
