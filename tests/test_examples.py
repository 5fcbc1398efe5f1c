"""Compares the scripts in `docs/deepspeed.md` on two ranks with plain torch in this process.
test_hf_examples.py runs the scripts in `docs/transformers.md`."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from forks import run_script
from launch import ROOT, deepspeed_command, run

sys.path.insert(0, str(ROOT / "examples"))

import train_autotp
import train_mpu

EXAMPLES = ROOT / "examples"
DOC = "".join((ROOT / "docs" / name).read_text() for name in ("deepspeed.md", "transformers.md"))
MARK = "  # added"

# The script named before each diff.
DIFFS = dict(re.findall(r"`examples/(train_\w+\.py)`:\n+```diff\n(.*?)```", DOC, re.DOTALL))


def start(name, *, by_launcher=False):
    """Runs a script; returns its output and the losses in it."""
    script = EXAMPLES / name
    output = run(deepspeed_command(script)) if by_launcher else run_script(script)
    return output, [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", output)]


def train_alone(model, batches, loss_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def llama_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def test_autotp_script():
    output, losses = start("train_autotp.py", by_launcher=True)
    assert "(101 x 32): strategy 'vocab', tied to lm_head" in output
    expected = train_alone(train_autotp.build_model(), train_autotp.batches(), llama_loss)
    assert losses == pytest.approx(expected, rel=1e-6)


def test_mpu_script():
    def loss_of(model, ids):
        x, _ = model.body(model.embed(ids[:, :-1]))
        return cross_entropy(model.head(x).flatten(0, 1), ids[:, 1:].flatten())

    output, losses = start("train_mpu.py")
    assert "(101 x 32): strategy 'vocab', tied to head" in output
    torch.manual_seed(0)
    expected = train_alone(train_mpu.LanguageModel(), train_mpu.batches(), loss_of)
    assert losses == pytest.approx(expected, rel=1e-6)


def test_doc_has_a_diff_of_each_script():
    scripts = {path.name for path in EXAMPLES.glob("train_*.py")} - {
        "train_lm.py",
        "train_monitored.py",
        "train_ngram.py",
    }
    assert sorted(DIFFS) == sorted(scripts)


@pytest.mark.parametrize("name", DIFFS)
def test_diff_of_the_doc_is_that_of_the_script(name):
    """The diff adds the lines that the script marks; the script has its lines and their context."""
    diff = [line for line in DIFFS[name].splitlines() if line.strip()]
    script = [line.strip() for line in (EXAMPLES / name).read_text().splitlines()]
    marked = [line.removesuffix(MARK) for line in script if line.endswith(MARK)]
    if marked:
        assert [line[1:].strip() for line in diff if line.startswith("+")] == marked

    rest = iter([line.removesuffix(MARK) for line in script])
    for line in diff:
        if not line.startswith("-"):
            assert line[1:].strip() in rest, line  # `in` continues from the line before.
