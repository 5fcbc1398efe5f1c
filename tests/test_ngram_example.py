"""The reason for n-gram tables: `examples/train_ngram.py`, for a few steps."""

from __future__ import annotations

import re

from forks import run_script
from launch import ROOT


def test_the_table_lowers_the_validation_loss(tmp_path):
    options = ["--steps", 60, "--max-bytes", 1_000_000, "--vocab-size", 500, "--rows", 20_000]
    output = run_script(ROOT / "examples" / "train_ngram.py", *options, cwd=tmp_path)
    lines = re.findall(r"(without the table|with \d+ rows): step (\d+), .* loss ([\d.]+)", output)
    curves: dict[str, list[float]] = {}
    for name, _, loss in lines:
        curves.setdefault(name, []).append(float(loss))
    without, with_table = curves["without the table"], curves["with 80000 rows"]
    assert [int(step) for _, step, _ in lines] == list(range(6, 61, 6)) * 2
    assert without[-1] < without[0]
    assert with_table[-1] < without[-1] - 0.1
    chart = (tmp_path / "runs" / "ngram.svg").read_text()
    assert "Validation loss" in chart
    assert "with the table" in chart
