"""Losses, log-probabilities, entropies, divergences and the largest logits of tokens, against torch
on all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from parity import whole
from token_problems import WAYS, V, heads, logits_of, problem
from tp_embed import FakeGang, OutputHead, ShardedEmbedding
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.nn import chunks, projection

KINDS = [VocabSharded, ShardedEmbedding]
per_kind = pytest.mark.parametrize("kind", KINDS)
per_way = pytest.mark.parametrize("way", WAYS)
# So few columns that even one token has more logits than all hidden states have items.
CLASSES, DIM = 61, 3


def compare(gang, kind, way, soft_cap, temperature, num_classes, dim, clean=False):
    """Values and gradients of hidden states, weight and bias."""
    ours, theirs, has_temperature = WAYS[way]
    student, teacher, target = problem(num_classes, dim=dim)
    if clean or "ignore_index" in str(ours):
        target = target.clamp_min(0)
    table, bias, x = student
    options = {"temperature": temperature} if has_temperature else {}
    scale = temperature if has_temperature else 1.0
    inputs = [x.requires_grad_(), bias, table.weight]
    logits = logits_of(student, soft_cap, scale), logits_of(teacher, soft_cap, scale).detach()
    expected = theirs(*logits, target)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = list(torch.autograd.grad(expected, inputs, upstream))

    embed, head, of_teacher = heads(kind, gang, student, teacher, soft_cap)
    with torch.no_grad():
        torch.testing.assert_close(ours(head, x, of_teacher, target, **options), expected)
    found = ours(head, x, of_teacher, target, **options)
    torch.testing.assert_close(found, expected)
    inputs[2] = embed.weight
    for _ in range(2):
        x_grad, bias_grad, grad = torch.autograd.grad(found, inputs, upstream, retain_graph=True)
        torch.testing.assert_close([x_grad, bias_grad, whole(embed, grad)], gradients)
    frozen = inputs[:1]
    embed.weight.requires_grad_(False)
    bias.requires_grad_(False)
    found = ours(head, x, of_teacher, target, **options)
    torch.testing.assert_close(torch.autograd.grad(found, frozen, upstream)[0], gradients[0])


def compare_in_chunks(gang, kind, way, soft_cap, temperature):
    most = CLASSES if kind is ShardedEmbedding else -(-CLASSES // gang.size)
    # One token, three tokens, and all tokens at a time; five rows of the weight, and all.
    for tokens, rows in [(0, 5), (3, 5), (10, CLASSES)]:
        chunks._CHUNK_BYTES = 4 * most * tokens * (2 if "divergence" in way else 1)
        projection._BLOCK_BYTES = 4 * DIM * rows
        compare(gang, kind, way, soft_cap, temperature, CLASSES, DIM)


@per_kind
@per_way
@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_are_those_of_torch(pool, size, way, kind):
    for soft_cap, temperature in [(None, 1.0), (1.5, 0.7)]:
        pool(size, compare_in_chunks, kind, way, soft_cap, temperature)


@per_kind
@per_way
def test_values_with_empty_shards(pool, way, kind):
    pool(4, compare, kind, way, 1.5, 1.0, 5, 6, clean=True)


def masked_classes(gang, kind, way):
    """Classes that are out of the question, at the edges of shards too."""
    ours, theirs, _ = WAYS[way]
    student, teacher, target = problem()
    for masked in range(V):
        for _, bias, _ in (student, teacher):
            bias.data.zero_()[masked] = -torch.inf
        wanted = torch.where((target == masked) | (target + 1 == masked), -100, target)
        logits = logits_of(student), logits_of(teacher).detach()
        if "divergence" in way:
            keep = torch.arange(V) != masked
            logits = logits[0][..., keep], logits[1][..., keep]
        elif way == "entropy":
            logits = logits[0][..., torch.arange(V) != masked], None
        expected = theirs(*logits, wanted)
        _, head, of_teacher = heads(kind, gang, student, teacher)
        x = student[2].clone().requires_grad_()
        found = ours(head, x, of_teacher, wanted)
        torch.testing.assert_close(found, expected)
        found[torch.isfinite(found)].sum().backward()
        assert torch.isfinite(x.grad).all()


@per_kind
@pytest.mark.parametrize("way", [w for w in WAYS if "smooth" not in w and "mean" not in w])
def test_masked_classes(pool, way, kind):
    pool(2, masked_classes, kind, way)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_divergence_from_a_distribution_that_lacks_a_class_is_infinite(reverse):
    student, teacher, _ = problem()
    lacking = teacher if reverse else student
    lacking[1].data[3] = -torch.inf
    lacking = (student if reverse else teacher)[1]
    lacking.data[3] = -300.0  # So rare that its probability is zero.
    _, head, of_teacher = heads(VocabSharded, FakeGang("cpu"), student, teacher)
    assert (head.kl_divergence(student[2], *of_teacher, reverse=reverse) == torch.inf).all()


def equal_logits(gang, kind):
    torch.manual_seed(0)
    student, teacher, _ = problem(CLASSES)
    levels = torch.randint(3, (CLASSES,)).double()
    student[0].weight.data.zero_()
    student[1].data.copy_(levels)
    _, head, _ = heads(kind, gang, student, teacher)
    order = levels.sort(descending=True, stable=True)
    for k in (1, 2, 7, 25, 50, CLASSES):
        values, ids = head.top_k(student[2], k)
        assert torch.equal(values, order.values[:k].expand_as(values))
        assert torch.equal(ids, order.indices[:k].expand_as(ids))


@per_kind
@pytest.mark.parametrize("size", [1, 2, 3])
def test_equal_logits_come_in_the_order_of_ids(pool, size, kind):
    pool(size, equal_logits, kind)


def tell_nan(gang, kind):
    student, teacher, _ = problem()
    student[1].data[5] = torch.nan
    _, head, of_teacher = heads(kind, gang, student, teacher)
    x, target = student[2], torch.zeros(2, 5, dtype=torch.long)
    values, ids = head.top_k(x, 3)
    assert torch.isnan(values[..., 0]).all()
    assert not torch.isnan(values[..., 1:]).any()
    assert (ids[..., 0] == 5).all()
    for found in (
        head.log_probs(x, target),
        head.entropy(x),
        head.kl_divergence(x, *of_teacher),
        head.kl_divergence(x, *of_teacher, reverse=True),
    ):
        assert torch.isnan(found).all()


@per_kind
def test_nan_is_told(pool, kind):
    pool(2, tell_nan, kind)


def test_no_token_and_no_target():
    student, teacher, _ = problem()
    _, head, _ = heads(VocabSharded, FakeGang("cpu"), student, teacher)
    x, none = torch.randn(0, 6, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    assert head.log_probs(x, none).shape == head.entropy(x).shape == (0,)
    assert head.top_k(x, 2)[0].shape == (0, 2)
    x = student[2].requires_grad_()
    ignored = torch.full((2, 5), -100)
    weight = torch.ones(V, dtype=torch.float64)
    logits = logits_of(student).flatten(0, 1)
    assert functional.cross_entropy(logits, ignored.flatten(), weight=weight).isnan()
    loss = head.loss(x, ignored, weight=weight)
    assert loss.isnan()
    (loss + head.log_probs(x, ignored).sum()).backward()
    assert not x.grad.any()


def test_a_single_token():
    student, teacher, _ = problem()
    student, teacher = [(*side[:2], side[2][0, 0]) for side in (student, teacher)]
    _, head, of_teacher = heads(VocabSharded, FakeGang("cpu"), student, teacher)
    for way, (ours, theirs, _) in WAYS.items():
        if "loss" in way or "mean" in way or "sum" in way:
            continue
        logits = logits_of(student), logits_of(teacher)
        target = torch.tensor(3)
        torch.testing.assert_close(
            ours(head, student[2], of_teacher, target), theirs(*logits, target)
        )


def other_caps(gang, kind):
    """Caps given to a call, in place of the heads'."""
    student, teacher, target = problem()
    _, head, (teacher_x, teacher_head) = heads(kind, gang, student, teacher, 9.0)
    x = student[2]
    capped, plain = logits_of(student, 1.5), logits_of(student)
    log_p = capped.log_softmax(-1)
    target = target.clamp_min(0)
    expected = log_p.gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(head.log_probs(x, target, soft_cap=1.5), expected)
    torch.testing.assert_close(head.loss(x, target, reduction="none", soft_cap=1.5), -expected)
    torch.testing.assert_close(head.entropy(x, soft_cap=1.5), -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(head.top_k(x, 3, soft_cap=None)[0], plain.topk(3).values)
    teacher_p = logits_of(teacher, 2.0).log_softmax(-1)
    options = {"soft_cap": 1.5, "teacher_soft_cap": 2.0}
    found = head.kl_divergence(x, teacher_x, teacher_head, **options)
    torch.testing.assert_close(found, (teacher_p.exp() * (teacher_p - log_p)).sum(-1))


@per_kind
def test_soft_caps_of_a_call(pool, kind):
    pool(2, other_caps, kind)


HEAD = OutputHead(VocabSharded(FakeGang("cpu"), V, 6))
X, TARGET = torch.randn(2, 6), torch.tensor([1, 2])


def of_one(size, kind=VocabSharded, classes=V):
    return OutputHead(kind(FakeGang("cpu", rank=0, size=size), classes, 6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HEAD.log_probs(X, TARGET, 0.0), ValueError, "`temperature` must be positive, but"),
        (
            lambda: HEAD.entropy(X, torch.tensor(1.0)),
            TypeError,
            "`temperature` must be a number, but is a `Tensor`",
        ),
        (lambda: HEAD.entropy(X, soft_cap=-1.0), ValueError, "`soft_cap` must be positive, or"),
        (lambda: HEAD.log_probs(X, TARGET[:1]), ValueError, r"`target` must have the shape \(2,\)"),
        (lambda: HEAD.log_probs(X, TARGET * 9), IndexError, r"in \[0, 11\) or -100"),
        (lambda: HEAD.log_probs(X, TARGET.float()), TypeError, "must have an integer dtype"),
        (
            lambda: HEAD.loss(X, TARGET[:, None], reduction="none"),
            ValueError,
            r"`target` must have the shape \(2,\), one class for each token, but has \(2, 1\)",
        ),
        (lambda: HEAD.loss(X, TARGET, reduction="max"), ValueError, "must be 'mean', 'sum' or"),
        (
            lambda: HEAD.loss(X, TARGET, weight=torch.ones(5)),
            ValueError,
            r"`weight` must have the shape \(11,\), a weight for each class, whole",
        ),
        (
            lambda: HEAD.loss(X, TARGET, weight=torch.ones(V, requires_grad=True)),
            ValueError,
            r"`weight` must not require a gradient.* `weight.detach\(\)`",
        ),
        (
            lambda: HEAD.loss(X, TARGET, weight=torch.ones(V), z_loss=0.1),
            ValueError,
            "`weight` must be None with `z_loss`",
        ),
        (lambda: HEAD.top_k(X, 0), ValueError, r"`k` must be in \[1, 11\] .*, but is 0 instead"),
        (lambda: HEAD.top_k(X, 12), ValueError, r"`k` must be in \[1, 11\]"),
        (
            lambda: HEAD.kl_divergence(X, X, torch.nn.Linear(6, V)),
            TypeError,
            "`teacher_head` must be an `OutputHead`, but is a `Linear`",
        ),
        (
            lambda: HEAD.kl_divergence(X, X[:1], HEAD),
            ValueError,
            r"`teacher_x` must have the shape \(2, 6\), but has \(1, 6\)",
        ),
        (
            lambda: HEAD.kl_divergence(X, X.clone().requires_grad_(), HEAD),
            ValueError,
            r"`teacher_x` must not require a gradient.*`teacher_x.detach\(\)`",
        ),
        (
            lambda: HEAD.kl_divergence(X, X, of_one(1, classes=12)),
            ValueError,
            "`teacher_head` must be cut like this head, 11 classes .*, but is 12 classes",
        ),
        (
            lambda: HEAD.kl_divergence(X, X, of_one(1, ShardedEmbedding)),
            ValueError,
            "along the vocabulary .* along the embedding dimension .* by the same strategy",
        ),
        (lambda: HEAD.kl_divergence(X, X, of_one(2)), ValueError, "cut like this head"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
