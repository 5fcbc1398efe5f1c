"""Compares a step of GRPO on two ranks with plain torch in one process."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from forks import run_script
from launch import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import grpo_step


class WholeHead(nn.Linear):
    """The functions of an `OutputHead` that the example calls, on all logits."""

    def log_probs(self, x, target, temperature):
        log_p = (self(x) / temperature).log_softmax(-1)
        kept = target != -100
        return log_p.gather(-1, target.masked_fill(~kept, 0)[..., None])[..., 0] * kept

    def entropy(self, x, temperature):
        return torch.distributions.Categorical(logits=self(x) / temperature).entropy()

    def kl_divergence(self, x, teacher_x, teacher_head, temperature, *, reverse):
        assert reverse
        student, teacher = (
            (logits / temperature).log_softmax(-1) for logits in (self(x), teacher_head(teacher_x))
        )
        terms = functional.kl_div(teacher, student, reduction="none", log_target=True)
        return terms.sum(-1)

    def top_k(self, x, k):
        return self(x).topk(k)


def step_alone():
    torch.manual_seed(0)
    policy = grpo_step.Policy()
    policy.head = WholeHead(grpo_step.DIM, grpo_step.VOCAB_SIZE, bias=False)
    policy.head.weight = policy.embed.weight
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    rollout = grpo_step.roll_out(policy)
    assert (rollout.target == -100).any()
    reference_x, losses = reference.hidden(rollout.ids), []
    for _ in range(grpo_step.UPDATES):
        optimizer.zero_grad()
        loss = policy(rollout, reference_x, reference.head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_step_of_grpo():
    output = run_script(ROOT / "examples" / "grpo_step.py")
    losses = [float(loss) for loss in re.findall(r"update \d+: loss (-?[\d.]+)", output)]
    expected = step_alone()
    assert len(set(losses)) == grpo_step.UPDATES
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)
