"""Values of tokens in engines at ZeRO 0 to 3, against plain torch in one process, and against
DeepSpeed's functions of logits."""

from __future__ import annotations

import sys

import pytest
import torch

from forks import run_script
from launch import ROOT
from token_problems import plain_divergence, plain_entropy, plain_log_probs

sys.path.insert(0, str(ROOT / "tests" / "jobs"))

import token_values_job


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("values")
    run_script(ROOT / "tests" / "jobs" / "token_values_job.py", out)
    return [torch.load(out / f"seen{rank}.pt") for rank in range(2)]


class WholeHead(torch.nn.Linear):
    """The same by torch, from all logits."""

    def loss(self, x, target, **options):
        return torch.nn.functional.cross_entropy(self(x), target, **options)

    def log_probs(self, x, target, temperature=1.0):
        return plain_log_probs(self(x) / temperature, None, target)

    def entropy(self, x):
        return plain_entropy(self(x))

    def kl_divergence(self, x, teacher_x, teacher, temperature=1.0, *, reverse=False):
        logits = self(x) / temperature, teacher(teacher_x).detach() / temperature
        return plain_divergence(*logits, None, reverse=reverse)

    def top_k(self, x, k):
        return self(x).topk(k)


def train_alone(tied):
    model = token_values_job.build(tied)
    head = model.head
    model.head = WholeHead(head.in_features, head.out_features, bias=not tied)
    model.head.weight, model.head.bias = head.weight, head.bias
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=token_values_job.LR), []
    for ids in token_values_job.batches():
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [True, False])
def test_engines_train_as_torch_does(seen, tied):
    expected = train_alone(tied)
    assert len(set(expected)) == len(expected)
    for rank in range(2):
        for stage in range(4):
            assert seen[rank][f"{stage} {tied}"] == pytest.approx(expected, rel=1e-5), stage


@pytest.mark.parametrize("way", ["log-probs", "entropy", "divergence", "reverse"])
def test_values_are_those_of_deepspeed(seen, way):
    for rank in range(2):
        found = seen[rank]["side by side"][way]
        torch.testing.assert_close(found[:3], found[3:], rtol=1e-5, atol=1e-6)
