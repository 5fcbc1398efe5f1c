"""What values of tokens hold and send, and how exact they are in low precision."""

from __future__ import annotations

import pytest
import torch
from test_loss_precision import set_products
from test_loss_work import Seen
from torch.distributed.tensor.debug import CommDebugMode

from parity import whole
from token_problems import WAYS, heads, logits_of, problem
from tp_embed import FakeGang, OutputHead, ShardedEmbedding
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.nn import chunks

per_kind = pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])


def logits_held(gang, way, soft_cap, frozen):
    """A chunk of eight tokens, much larger than the temporaries of its parts."""
    chunks._CHUNK_BYTES, ours = 4 * 1024 * 8, WAYS[way][0]
    student, teacher, target = problem(1024, torch.float32, dim=6)
    student, teacher = [(*side[:2], side[2].repeat(1, 8, 1)) for side in (student, teacher)]
    student[0].weight.requires_grad_(not frozen)
    x, target = student[2].requires_grad_(), target.clamp_min(0).repeat(1, 8)
    embed, head, of_teacher = heads(VocabSharded, gang, student, teacher, soft_cap)
    with Seen() as seen:
        ours(head, x, of_teacher, target).sum().backward()
    assert (embed.weight.grad is None) == frozen
    assert seen.numel == 1024 * 8
    return seen.multiplications / (80 * 1024 * 6)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("way", WAYS)
def test_no_more_logits_are_held_than_of_a_chunk(monkeypatch, way, soft_cap):
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", chunks._CHUNK_BYTES)
    teacher = 2 * 5 / 6 if "divergence" in way else 0.0
    again = 0 if way == "top k" else 1
    kept = 0.9 if "ignore_index" in str(WAYS[way][0]) else 1.0
    smooth = 1 / 6 if "smooth" in way else 0.0
    for frozen in (False, True):
        products = logits_held(FakeGang("cpu"), way, soft_cap, frozen)
        gradients = 1 if frozen else 2
        assert products == pytest.approx(kept * (1 + again + teacher + smooth + gradients))


def test_ignored_tokens_take_no_work():
    head = OutputHead(VocabSharded(FakeGang("cpu"), 11, 6))
    target = torch.tensor([-100, 3, -100, -100, 4, -100])
    with Seen() as seen, torch.no_grad():
        head.log_probs(torch.randn(6, 6), target)
    assert seen.multiplications == 2 * 11 * 6


def volumes(gang, kind, way):
    ours, _, _ = WAYS[way]
    student, teacher, target = problem(dtype=torch.float32)
    x = student[2].requires_grad_()
    _, head, of_teacher = heads(kind, gang, student, teacher)
    with CommDebugMode() as forward:
        values = ours(head, x, of_teacher, target.clamp_min(0))
    with CommDebugMode() as backward:
        values.sum().backward()
    return [{str(n): c for n, c in mode.get_comm_counts().items()} for mode in (forward, backward)]


@pytest.mark.parametrize("way", WAYS)
def test_they_send_what_they_say(pool, way):
    gather, reduce = "c10d._allgather_base_", "c10d.allreduce_"
    found = pool(2, volumes, VocabSharded, way)[0]
    # The second all-reduce is of the gradient of the bias.
    assert found == [{gather: 2 if way == "top k" else 1}, {reduce: 2}]
    found = pool(2, volumes, ShardedEmbedding, way)[0]
    sums = 2 if "divergence" in way else 1
    again = {} if way == "top k" else {reduce: sums}
    assert found == [{reduce: sums}, {gather: 1, **again}]


def in_low_precision(gang, kind, way, dtype, scale, widened):
    """Relative errors of values and of the gradients of hidden states and weight: ours and torch's,
    to fp64 of the same inputs."""
    set_products(widened)
    ours, theirs, _ = WAYS[way]
    student, teacher, target = problem(257)
    target = target.clamp_min(0)
    for table, bias, x in (student, teacher):
        for tensor in (table.weight, bias, x):
            tensor.data = tensor.to(dtype).double()  # The same values in both.
    upstream = torch.linspace(0.05, 0.15, 10, dtype=torch.float64).view(2, 5)
    seen = []
    for to in (torch.float64, dtype, None):
        cast = to or dtype
        sides = [(table.to(cast), bias, x.to(cast)) for table, bias, x in (student, teacher)]
        for table, bias, _ in sides:
            bias.data = bias.to(cast)
            table.weight.grad = None
        x = sides[0][2].detach().requires_grad_()
        sides[0] = (*sides[0][:2], x)
        if to is not None:
            wide = torch.promote_types(cast, torch.float32)
            logits = [logits_of(side).to(wide) for side in sides]
            values, embed = theirs(logits[0], logits[1].detach(), target), sides[0][0]
        else:
            embed, head, of_teacher = heads(kind, gang, *sides)
            values = ours(head, x, of_teacher, target)
        factor = upstream if values.dim() == 2 else upstream[..., None]
        (values.double() * factor * scale).sum().backward()
        seen.append([values, x.grad / scale, whole(embed, embed.weight.grad) / scale])
    exact = seen[0]
    return [
        [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
        for found in seen[1:]
    ]


CASES = [
    (torch.bfloat16, 1.0),
    (torch.float16, 2.0**12),
    (torch.float16, 2.0**16),  # DeepSpeed's first loss scale, which fp16 does not hold.
]


TESTED = ["losses", "log-probs", "entropy", "divergence", "reverse divergence"]


@per_kind
@pytest.mark.parametrize("way", [*TESTED, "top k"])
def test_fp32_is_exact(pool, way, kind):
    _, ours = pool(2, in_low_precision, kind, way, torch.float32, 1.0, True)[0]
    assert max(ours) < 1e-6


@per_kind
@pytest.mark.parametrize(("dtype", "scale"), CASES)
@pytest.mark.parametrize("way", TESTED)
def test_low_precision_is_as_exact_as_torch(pool, way, dtype, scale, kind):
    for widened in (False, True):
        theirs, ours = pool(2, in_low_precision, kind, way, dtype, scale, widened)[0]
        for our, their in zip(ours, theirs, strict=True):
            assert our < 1.5 * their + 1e-3


def under_autocast(gang, kind, way):
    """Where products run in fp32, autocast changes nothing."""
    set_products(True)
    ours, theirs, _ = WAYS[way]
    student, teacher, target = problem(257, torch.float32)
    target = target.clamp_min(0)
    _, head, of_teacher = heads(kind, gang, student, teacher)
    x = student[2].requires_grad_()
    expected = theirs(logits_of(student), logits_of(teacher).detach(), target)
    with torch.autocast("cpu", torch.bfloat16):
        values = ours(head, x, of_teacher, target)
        found = [values.detach(), *torch.autograd.grad(values.sum(), x)]
    torch.testing.assert_close(found, [expected, *torch.autograd.grad(expected.sum(), x)])


@pytest.mark.parametrize("way", WAYS)
def test_functions_of_logits_do_not_run_in_the_dtype_of_autocast(pool, way):
    pool(2, under_autocast, VocabSharded, way)
