"""Values of tokens in checkpointed regions, under fp16 autocast, and with masked classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tp_embed import FakeGang, OutputHead, ShardedEmbedding, StandardEmbedding
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.nn import projection

KINDS = [VocabSharded, ShardedEmbedding]
WAYS = {
    "loss": lambda head, x, target: head.loss(x, target, reduction="none"),
    "weighted loss": lambda head, x, target: head.loss(x, target, weight=torch.linspace(0, 2, 37)),
    "log_probs": lambda head, x, target: head.log_probs(x, target),
    "entropy": lambda head, x, target: head.entropy(x),
    "kl_divergence": lambda head, x, target: head.kl_divergence(x, x.detach().flip(0), head),
    "top_k": lambda head, x, target: head.top_k(x, 3)[0],
}
LOGITS = {
    "loss": lambda y, target: functional.cross_entropy(y, target, reduction="none"),
    "weighted loss": lambda y, target: functional.cross_entropy(
        y, target, weight=torch.linspace(0, 2, 37)
    ),
    "log_probs": lambda y, target: y.log_softmax(-1).gather(1, target[:, None])[:, 0],
    "entropy": lambda y, target: torch.distributions.Categorical(logits=y).entropy(),
    "top_k": lambda y, target: y.topk(3).values,
}


def problem(gang, kind, deterministic=None):
    """Returns a head, its table whole, a bias, hidden states and targets."""
    torch.manual_seed(0)
    table, bias = StandardEmbedding(37, 8), torch.nn.Parameter(torch.randn(37))
    table.weight.data.mul_(0.3)
    head = OutputHead(kind.from_embedding(table, gang), bias=bias, deterministic=deterministic)
    return head, table.weight, bias, torch.randn(12, 8), torch.randint(37, (12,))


def compare_checkpointed(gang, kind, way, deterministic):
    found = []
    for reentrant in (None, False, True):
        head, _, bias, x, target = problem(gang, kind, deterministic)
        x.requires_grad_()

        def values(x, head=head, target=target):
            return WAYS[way](head, x, target)

        is_plain = reentrant is None
        output = values(x) if is_plain else checkpoint(values, x, use_reentrant=reentrant)
        output.sum().backward()
        found.append((output, x.grad, head.weight.grad, bias.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("deterministic", [None, "topology"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_checkpointed_values_are_the_same(pool, size, way, kind, deterministic):
    pool(size, compare_checkpointed, kind, way, deterministic)


def compare_fp16(gang, kind, way):
    """fp32 weights with products in fp16, as on an accelerator."""
    able = next(n for n, is_there in torch.cpu.get_capabilities().items() if is_there is True)
    projection._CPU_PRODUCTS = {torch.float16: (able,)}
    head, weight, bias, x, target = problem(gang, kind)
    x.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        found = WAYS[way](head, x, target).sum()
        logits = functional.linear(x, weight, bias)
    expected, own = LOGITS[way](logits.float(), target).sum(), head.partition.shard(gang.rank)
    for scale in (1.0, 2.0**10):
        ours = torch.autograd.grad(found * scale, [x, head.weight, bias], retain_graph=True)
        theirs = list(torch.autograd.grad(expected * scale, [x, weight, bias], retain_graph=True))
        theirs[1] = theirs[1].narrow(head.shard_dim, own.start, len(own))
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine - other).norm() < 5e-3 * other.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", LOGITS)
@pytest.mark.parametrize("size", [1, 2])
def test_gradients_under_fp16_autocast(pool, size, way, kind):
    pool(size, compare_fp16, kind, way)


def compare_masked(gang, kind, deterministic, num_classes):
    """More classes than those with finite logits, as in a padded vocabulary."""
    torch.manual_seed(0)
    table = StandardEmbedding(num_classes, 4, dtype=torch.float64)
    bias = torch.zeros(num_classes, dtype=torch.float64)
    bias[num_classes - 10 :] = bias[3] = -torch.inf
    x = torch.randn(2, 4, dtype=torch.float64)
    head = OutputHead(
        kind.from_embedding(table, gang),
        bias=torch.nn.Parameter(bias),
        deterministic=deterministic,
    )
    values, ids = head.top_k(x, num_classes - 5)
    logits = functional.linear(x, table.weight, bias)
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, : num_classes - 5])
    torch.testing.assert_close(values, expected.values[:, : num_classes - 5])


@pytest.mark.parametrize("num_classes", [37, 600, 1100])
@pytest.mark.parametrize("deterministic", [None, "topology"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_masked_classes_come_last_by_their_ids(pool, size, kind, deterministic, num_classes):
    pool(size, compare_masked, kind, deterministic, num_classes)


def test_a_teacher_that_takes_other_positions_is_refused():
    gang = FakeGang("cpu")
    embed = VocabSharded(gang, 11, 6)
    student, teacher = OutputHead(embed, input="sequence"), OutputHead(embed)
    with pytest.raises(ValueError, match=r"for sequence hidden states, but is .* same `input`"):
        student.kl_divergence(torch.randn(3, 6), torch.randn(3, 6), teacher)
