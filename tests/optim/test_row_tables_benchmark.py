"""Runs `benchmarks/row_tables.py` with small tables."""

from __future__ import annotations

import pytest

import row_tables as benchmark
from forks import run_script
from launch import ROOT

ROWS, DIM = 600, 8


def test_writes_times_and_state_bytes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{benchmark.BEGIN}\n{benchmark.END}\nAfter.\n")
    run_script(
        ROOT / "benchmarks" / "row_tables.py",
        *("--rows", ROWS, "--dim", DIM, "--ids", 16, "--rounds", 1, "--grow", 300, 600),
        *("--compare", *benchmark.COMPARISONS, "--dtypes", "float32", "bfloat16"),
        *("--markdown", page),
        ranks=2,
    )
    text = page.read_text()
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "ms" not in line]
    states: dict[str, list[float]] = {}
    for row in rows:
        if len(row) == 8:
            assert float(row[1]) > 0
            states.setdefault(row[0], []).append(float(row[7]))
    scale = 12 / ROWS  # Of a row of other Parameters, on each tensor-parallel rank.
    assert states == {
        benchmark.DENSE.label: pytest.approx([12 + 2 * scale] * 2, abs=1e-3),
        benchmark.WHOLE.label: pytest.approx([12 + scale] * 2, abs=1e-3),
        "`rowwise_adagrad`": [0.5, 2.5],
        "`rowwise_adam`": [4.5, 6.5],
        "`lazy_adam`": [8.0, 10.0],
        benchmark.WORLD.label: [0.5, 0.5, 2.5, 2.5],
    }
    grown = [row[0] for row in rows if len(row) == 7]
    assert grown == [f"{way.label}, {n} rows" for way in benchmark.GROWN for n in (300, 600)]
