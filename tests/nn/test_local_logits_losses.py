"""Vocabulary-parallel losses of other libraries take the logits of a rank's classes."""

from __future__ import annotations

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.sequence.cross_entropy import VocabParallelCausalLMLoss, vocab_parallel_cross_entropy
from deepspeed.sequence.vocab_parallel_ops import (
    vocab_parallel_entropy,
    vocab_parallel_kl_div,
    vocab_parallel_logprobs,
)
from torch.distributions import Categorical
from torch.nn import functional

from tp_embed import OutputHead, StandardEmbedding, VocabShardedEmbedding
from tp_embed.nn.local_logits import LocalLogits
from tp_embed.parameter.sharded import local

V, E = 11, 6


class MegatronsCrossEntropy(torch.autograd.Function):
    """As `megatron.core.tensor_parallel.cross_entropy`, of Megatron-Core 0.12, whose operations it
    has in the same order, without label smoothing."""

    @staticmethod
    def forward(ctx, logits, target, start, end, group):
        logits = logits.float()
        largest = torch.max(logits, dim=-1)[0]
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        logits -= largest.unsqueeze(dim=-1)
        mask = (target < start) | (target >= end)
        masked = target.clone() - start
        masked[mask] = 0
        flat, flat_target = logits.view(-1, logits.size(-1)), masked.view(-1)
        rows = torch.arange(start=0, end=flat.size(0), device=flat.device)
        predicted = flat[rows, flat_target].clone().contiguous().view_as(target)
        predicted[mask] = 0.0
        exp = logits
        torch.exp(logits, out=exp)
        sums = exp.sum(dim=-1)
        dist.all_reduce(predicted, op=dist.ReduceOp.SUM, group=group)
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
        loss = torch.log(sums) - predicted
        exp.div_(sums.unsqueeze(dim=-1))
        ctx.save_for_backward(exp, mask, flat_target)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        softmax, mask, target = ctx.saved_tensors
        flat = softmax.view(-1, softmax.size(-1))
        rows = torch.arange(start=0, end=flat.size(0), device=flat.device)
        flat[rows, target] -= 1.0 - mask.view(-1).float()
        return softmax.mul_(grad_output.unsqueeze(dim=-1)), None, None, None, None


def losses(rows, group, teacher):
    """By name: the loss of this rank's logits, and the one of all."""
    start, end = rows.start, rows.stop
    cut = {"vocab_start_index": start, "vocab_end_index": end}
    own_teacher = teacher[..., start:end]

    def causal(y, target):
        return VocabParallelCausalLMLoss(group, **cut)(y, shift_labels=target)

    def divergence(y, target):
        expected = functional.kl_div(
            y.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
        )
        return expected.sum(-1)

    def whole(y, target, **options):
        return functional.cross_entropy(y.flatten(0, -2), target.flatten(), **options)

    return {
        "cross entropy of DeepSpeed": (
            lambda y, t: vocab_parallel_cross_entropy(y, t, group, **cut),
            whole,
        ),
        "causal loss of DeepSpeed": (causal, whole),
        "log-probs of DeepSpeed": (
            lambda y, t: vocab_parallel_logprobs(y, t, group, start, end),
            lambda y, t: y.log_softmax(-1).gather(-1, t[..., None])[..., 0],
        ),
        "entropy of DeepSpeed": (
            lambda y, t: vocab_parallel_entropy(y, group),
            lambda y, t: Categorical(logits=y).entropy(),
        ),
        "divergence of DeepSpeed": (
            lambda y, t: vocab_parallel_kl_div(y, own_teacher, tp_group=group),
            divergence,
        ),
        "cross entropy of Megatron": (
            lambda y, t: MegatronsCrossEntropy.apply(y * 1, t, start, end, group),
            lambda y, t: whole(y, t, reduction="none").view_as(t),
        ),
    }


NAMES = list(losses(range(V), None, torch.zeros(1, V)))


def check_loss(gang, name):
    torch.manual_seed(0)
    table, x = StandardEmbedding(V, E), torch.randn(2, 5, E, requires_grad=True)
    target, teacher = torch.randint(V, (2, 5)), torch.randn(2, 5, V)
    deepspeed.init_distributed("gloo", verbose=False)  # Takes the groups of the pool.
    head = OutputHead(VocabShardedEmbedding.from_embedding(table, gang), output="shard")
    ours, torchs = losses(head.rows, gang.as_process_group(), teacher)[name]

    expected = torchs(functional.linear(x, table.weight), target)
    weights = torch.linspace(0.5, 2.0, expected.numel()).view_as(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, table.weight])

    logits = head(x)
    assert isinstance(logits, LocalLogits) == (gang.size > 1)
    found = ours(logits, target)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad((found * weights).sum(), [x, head.weight])
    torch.testing.assert_close(gradients[0], wanted[0])
    own = wanted[1][head.rows.start : head.rows.stop]
    torch.testing.assert_close(local(gradients[1]), own)


@pytest.mark.filterwarnings("error:.*of this rank's classes")
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_others_take_them(pool, name, size):
    pool(size, check_loss, name)


class WithoutAGroup(torch.autograd.Function):
    """A loss of one process, as Liger's `LigerCrossEntropyFunction`."""

    @staticmethod
    def forward(ctx, logits, target):
        return functional.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, grad_output):
        return None, None


def functions_without_a_group(gang):
    head = OutputHead(VocabShardedEmbedding(gang, V, E), output="shard")
    logits, target = head(torch.randn(5, E)), torch.zeros(5, dtype=torch.long)
    if gang.size == 1:
        WithoutAGroup.apply(logits, target)
        return
    with pytest.raises(ValueError, match="`cross_entropy` must be given the logits of all classes"):
        WithoutAGroup.apply(logits, target)
    WithoutAGroup.apply(logits.as_subclass(torch.Tensor), target)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_functions_without_a_group_do_not(pool, size):
    pool(size, functions_without_a_group)
