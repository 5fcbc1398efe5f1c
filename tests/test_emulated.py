"""Code paths of accelerators on an emulated device, and `make gpu` on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_accelerator import CASES

from accelerator_checks import CHECKS
from forks import run_script
from launch import ROOT, SUPPORT

JOB = ROOT / "tests" / "jobs" / "emulated_job.py"

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{SUPPORT}:{ROOT / 'benchmarks'}",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def failures():
    printed = subprocess.check_output([sys.executable, str(JOB)], env=ENVIRONMENT, text=True)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("name", [name for name, (_, kinds) in CHECKS.items() if not kinds])
def test_check(failures, name):
    assert failures[name] is None, failures[name]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_case(failures, kind, options):
    found = {name: text for name, text in failures.items() if f": {kind} {options}" in name}
    assert len(found) == 3
    assert not any(found.values()), found


@pytest.mark.parametrize(
    "name",
    [
        "a second backward waits for nothing",
        "waiting is noticed",
        "no check of ids while a graph is captured",
    ],
)
def test_waiting(failures, name):
    assert failures[name] is None, failures[name]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_agree_with_torch(size, tmp_path):
    """With real collectives, all layouts, empty shards and short blocks."""
    printed = run_script(JOB, tmp_path / "store", ranks=size).splitlines()
    found = [json.loads(line) for line in printed if line.startswith(("[]", '["'))]
    assert found == [[]] * size


def test_the_command_for_a_gpu_runs_to_the_end(tmp_path):
    """A small version, on the CPU."""
    sizes = ["--vocab", "500", "--dim", "16", "--tokens", "64", "--seconds", "0.001"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", *sizes]
    job = subprocess.run(
        [*command, "--output", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stdout + job.stderr
    (record,) = tmp_path.glob("*.json")
    found = json.loads(record.read_text())
    on_cpu = [name for name, (_, kinds) in CHECKS.items() if not kinds or "cpu" in kinds]
    assert set(on_cpu) <= set(found["checks"])
    assert not any(found["checks"].values())
    names = [row["what"] for row in found["times"]]
    page = record.with_suffix(".md").read_text()
    assert all(f"| {name} |" in page for name in names)
    assert {"torch.nn.Embedding, forward", "OutputHead.loss"} <= set(names)


def test_the_command_says_what_is_missing():
    job = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py")],
        env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert job.returncode == 2
    assert "sees no GPU" in job.stderr
