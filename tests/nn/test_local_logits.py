"""Logits of a rank's classes: what may be done to them, and what is refused."""

from __future__ import annotations

import deepspeed
import pytest
import torch
from deepspeed.sequence.vocab_parallel_ops import vocab_parallel_entropy, vocab_parallel_logprobs

from loss_problems import V, problem
from tp_embed import FakeGang, OutputHead, VocabShardedEmbedding
from tp_embed.nn.local_logits import LocalLogits


def losses_of_deepspeed(gang):
    deepspeed.init_distributed("gloo", verbose=False)  # Takes the groups of the pool.
    table, bias, x, target = problem(V)
    target = target.clamp_min(0)
    head = OutputHead(VocabShardedEmbedding.from_embedding(table, gang), bias=bias, output="shard")
    start, logits = head.rows.start, head(x).float()
    group, end = gang.as_process_group(), head.rows.stop
    found = vocab_parallel_logprobs(logits, target, group, start, end)
    expected = head.log_probs(x, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert type(found) is torch.Tensor
    entropy = vocab_parallel_entropy(logits, group)
    torch.testing.assert_close(entropy.double(), head.entropy(x), rtol=1e-5, atol=1e-5)


def test_losses_of_deepspeed_take_them(pool):
    pool(2, losses_of_deepspeed)


def local_logits():
    embed = VocabShardedEmbedding(FakeGang("cpu", rank=1, size=3), V, 6)
    return OutputHead(embed, output="shard")(torch.randn(2, 5, 6, requires_grad=True))


KEPT = {
    "cast": lambda y: y.float().bfloat16(),
    "scale": lambda y: 30 * torch.tanh(y / 30),
    "shift": lambda y: y[..., :-1, :].contiguous().view(-1, y.shape[-1]),
    "mask of tokens": lambda y: y[torch.ones(2, 5, dtype=torch.bool)],
    "one token": lambda y: y[0][1],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_models_do_keeps_the_kind(name):
    kept = KEPT[name](local_logits())
    assert isinstance(kept, LocalLogits)
    with pytest.raises(ValueError, match=r"`softmax` must be given the logits of all classes"):
        kept.softmax(-1)


def test_sums_over_the_classes_are_plain():
    logits = local_logits()
    for values in (logits.amax(-1), logits.exp().sum(-1), logits.sum(), logits[0, :4].sum(-1)):
        assert type(values) is torch.Tensor
    plain = logits.as_subclass(torch.Tensor)
    torch.testing.assert_close(plain.softmax(-1).sum(-1), torch.ones(2, 5))


def test_one_rank_has_plain_logits():
    embed = VocabShardedEmbedding(FakeGang("cpu"), V, 6)
    assert type(OutputHead(embed, output="shard")(torch.randn(2, 6))) is torch.Tensor
