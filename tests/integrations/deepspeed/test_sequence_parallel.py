"""Compares the example of sequence parallelism on two ranks with the same model in one process,
which holds all positions."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.functional import cross_entropy

import sequence_parallel as example
from forks import run_script
from tp_embed import FakeGang


def train_alone():
    torch.manual_seed(0)
    model = example.LanguageModel(FakeGang("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for ids in example.batches():
        optimizer.zero_grad()
        logits = model.head(model.hidden(ids[:, :-1]))
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_one_process():
    assert example.LENGTH % 2  # The ranks hold different numbers of positions.
    output = run_script(example.__file__)
    assert "(101 x 32): strategy 'vocab', tied to head" in output
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", output)]
    assert losses == pytest.approx(train_alone(), rel=1e-6)
