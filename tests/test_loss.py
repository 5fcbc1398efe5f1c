"""Cross entropy over a gang, against ``torch.nn.functional.cross_entropy`` of all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from parity import whole
from tp_embed import FakeGang, OutputHead, Partition, ShardedEmbedding, StandardEmbedding
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed import loss as tp_loss
from tp_embed.loss import cross_entropy, linear_cross_entropy

N, V, E = 10, 11, 6

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.2, "z_loss": 0.1, "reduction": "sum"},
    {"ignore_index": 4},
]
SMALLER_THAN_GANG = 3


def expected_loss(logits, target, *, z_loss=0.0, ignore_index=-100, reduction="mean", **options):
    """By torch, with the z-loss written out."""
    loss = functional.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="none", **options
    )
    valid = target != ignore_index
    loss = loss + z_loss * logits.logsumexp(-1).square() * valid
    return loss.sum() / valid.sum() if reduction == "mean" else loss.sum()


def problem(num_classes, dtype=torch.float64):
    torch.manual_seed(3)
    table = StandardEmbedding(num_classes, E, dtype=dtype)
    bias = nn.Parameter(torch.randn(num_classes, dtype=dtype))
    x = torch.randn(2, N // 2, E, dtype=dtype, requires_grad=True)
    target = torch.randint(num_classes, (2, N // 2))
    target[0, 1] = -100
    return table, bias, x, target


def check_head(gang, kind, num_classes, options, chunk_bytes):
    """The fused loss of a head and, over the vocabulary, the one of its own logits."""
    tp_loss._CHUNK_BYTES = chunk_bytes
    table, bias, x, target = problem(num_classes)
    if options.get("ignore_index") is not None:
        target = target.clamp_min(0)
    logits = functional.linear(x, table.weight, bias)
    expected = expected_loss(logits.flatten(0, -2), target.flatten(), **options)
    (3 * expected).backward()
    gradients = [t.grad for t in (x, bias, table.weight)]
    x.grad = bias.grad = None

    head = OutputHead(embed := kind.from_embedding(table, gang), bias=bias)
    ways = [lambda: head.loss(x, target, **options)]
    if kind is VocabSharded:
        local = OutputHead(embed, bias=bias, output="shard")
        ways.append(
            lambda: cross_entropy(local(x), target, gang, embed.partition, **options),
        )
    for way in ways:
        x.grad = bias.grad = embed.weight.grad = None
        with torch.no_grad():
            torch.testing.assert_close(way(), expected)
        loss = way()
        torch.testing.assert_close(loss, expected)
        (3 * loss).backward()
        found = [x.grad, bias.grad, whole(embed, embed.weight.grad)]
        torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_loss_is_that_of_torch(pool, size, kind, options):
    # One token, three tokens, and all tokens at a time.
    for chunk_bytes in (1, 4 * V * 3, 1 << 20):
        pool(size, check_head, kind, V, options, chunk_bytes)


@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_loss_with_empty_shards(pool, kind):
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    pool(4, check_head, kind, SMALLER_THAN_GANG, options, 1 << 20)


def losses_of_tokens(gang):
    table, bias, x, target = problem(V, torch.float32)
    embed = VocabSharded.from_embedding(table, gang)
    logits = OutputHead(embed, bias=bias, output="shard")(x)
    found = cross_entropy(logits, target, gang, embed.partition, reduction="none")
    whole_logits = functional.linear(x, table.weight, bias).flatten(0, -2)
    expected = functional.cross_entropy(whole_logits, target.flatten(), reduction="none")
    torch.testing.assert_close(found, expected.view_as(target))


def masked_classes(gang, kind):
    """Classes that are out of the question, at the edges of shards too."""
    table, bias, x, target = problem(V, torch.float32)
    for masked in range(V):
        bias.data.zero_()[masked] = -torch.inf
        wanted = torch.where(target == masked, -100, target)
        head = OutputHead(embed := kind.from_embedding(table, gang), bias=bias)
        expected = functional.cross_entropy(
            functional.linear(x, table.weight, bias).flatten(0, -2), wanted.flatten()
        )
        torch.testing.assert_close(head.loss(x, wanted), expected)
        if kind is VocabSharded:
            logits = OutputHead(embed, bias=bias, output="shard")(x)
            found = cross_entropy(logits, wanted, gang, embed.partition)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_masked_classes(pool, kind):
    pool(2, masked_classes, kind)


def test_losses_of_tokens(pool):
    pool(3, losses_of_tokens)


def low_precision(gang, kind, dtype, scale):
    """How far the gradients are from those in fp64, by each way, and how far those of torch are:
    all at once, and by their norm, which rounding errors of single items do not change."""
    table, _, x, target = problem(257)
    logits = functional.linear(x, table.weight)
    functional.cross_entropy(logits.flatten(0, -2), target.flatten()).backward()
    exact = x.grad, table.weight.grad

    def errors(x_grad, table_grad):
        found = [g.double() / scale for g in (x_grad, table_grad)]
        apart = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
        norms = [abs(float(f.norm() / e.norm()) - 1) for f, e in zip(found, exact, strict=True)]
        return apart + norms

    low = [t.detach().to(dtype).requires_grad_() for t in (x, table.weight)]
    logits = functional.linear(*low).float()
    loss = functional.cross_entropy(logits.flatten(0, -2), target.flatten())
    (loss * scale).backward()
    results = [errors(low[0].grad, low[1].grad)]

    table_low = StandardEmbedding(257, E, dtype=dtype)
    table_low.weight.data.copy_(table.weight)
    embed = kind.from_embedding(table_low, gang)
    ways = [OutputHead(embed).loss]
    if kind is VocabSharded:
        head = OutputHead(embed, output="shard")
        ways.append(lambda x, target: cross_entropy(head(x), target, gang, embed.partition))
    for way in ways:
        embed.weight.grad = None
        low_x = x.detach().to(dtype).requires_grad_()
        (way(low_x, target) * scale).backward()
        results.append(errors(low_x.grad, whole(embed, embed.weight.grad)))
    return results


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 1 / 7),  # As with seven micro-batches; bf16 would round it by 0.2%.
        (torch.float16, 2.0**12),
        (torch.float16, 2.0**16),  # DeepSpeed's first loss scale, which fp16 does not hold.
    ],
)
@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_low_precision_gradients_are_as_good_as_those_of_torch(pool, kind, dtype, scale):
    theirs, *ours = pool(2, low_precision, kind, dtype, scale)[0]
    for errors in ours:
        for our, their, slack in zip(errors, theirs, (1e-3, 1e-3, 1.5e-3, 1.5e-3), strict=True):
            assert our < 1.5 * their + slack


def test_gradients_are_not_computed_where_none_is_needed():
    x, weight = torch.randn(4, E), torch.randn(V, E, requires_grad=True)
    target, alone = torch.arange(4), (FakeGang("cpu"), Partition(V, 1))
    with Seen() as seen, torch.no_grad():
        linear_cross_entropy(x, weight, target, *alone)
    assert seen.products == 1
    with Seen() as seen:
        linear_cross_entropy(x, weight, target, *alone).backward()
    assert seen.products == 2


class Seen(TorchDispatchMode):
    """Sees the number of items of the largest tensor that an operation returns, and of products of
    matrices."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


def test_fused_loss_holds_no_logits(monkeypatch):
    tokens, classes, dim = 4096, 1024, 8
    monkeypatch.setattr(tp_loss, "_CHUNK_BYTES", 64 * classes * 4)
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


def volumes(gang, kind):
    table, _, x, target = problem(V, torch.float32)
    head = OutputHead(kind.from_embedding(table, gang))
    with CommDebugMode() as forward:
        loss = head.loss(x, target)
    with CommDebugMode() as backward:
        loss.backward()
    return [{str(n): c for n, c in mode.get_comm_counts().items()} for mode in (forward, backward)]


def test_fused_loss_sends_what_it_says(pool):
    gather, reduce = "c10d._allgather_base_", "c10d.allreduce_"
    assert pool(2, volumes, VocabSharded)[0] == [{reduce: 2}, {reduce: 1}]
    assert pool(2, volumes, ShardedEmbedding)[0] == [{reduce: 1}, {gather: 1}]


@pytest.mark.parametrize("fused", [False, True])
def test_no_token_at_all_is_nan_with_no_gradient(fused):
    x, weight = torch.randn(2, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    target, alone = torch.full((2,), -100), (FakeGang("cpu"), Partition(V, 1))
    if fused:
        ours = linear_cross_entropy(x, weight, target, *alone)
    else:
        ours = cross_entropy(functional.linear(x, weight), target, *alone)
    ours.backward()
    assert ours.isnan()
    assert functional.cross_entropy(functional.linear(x, weight), target).isnan()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_a_single_token():
    logits, target = torch.randn(V), torch.tensor(3)
    found = cross_entropy(logits, target, FakeGang("cpu"), Partition(V, 1))
    torch.testing.assert_close(found, functional.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(3)}, ValueError, r"`target` must have the shape \(2,\), one"),
        ({"target": torch.zeros(2)}, TypeError, "must have an integer dtype, but has torch.float"),
        ({"target": torch.tensor([0, 11])}, IndexError, r"in \[0, 11\) or -100 .* token 1 has 11"),
        ({"label_smoothing": 2.0}, ValueError, r"`label_smoothing` must be in \[0, 1\], but is 2"),
        ({"z_loss": -1.0}, ValueError, "`z_loss` must not be negative, but is -1"),
        ({"reduction": "none"}, ValueError, "must be 'mean' or 'sum', but is 'none' instead. For"),
    ],
)
def test_bad_input(change, error, message):
    target = change.pop("target", torch.tensor([0, 1]))
    with pytest.raises(error, match=message):
        linear_cross_entropy(
            torch.randn(2, E), torch.randn(V, E), target, FakeGang("cpu"), Partition(V, 1), **change
        )


def test_logits_of_another_width():
    gang, partition = FakeGang("cpu", rank=1, size=3), Partition(V, 3)
    with pytest.raises(ValueError, match="must have the 4 columns of this rank, but has 11 inst"):
        cross_entropy(torch.randn(2, V), torch.tensor([0, 1]), gang, partition)
