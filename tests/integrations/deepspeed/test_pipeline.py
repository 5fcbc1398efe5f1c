"""Tables of pipelines on real DeepSpeed engines over four ranks."""

from __future__ import annotations

import re

import pytest
import torch

import pipeline_job as job
from forks import run_script
from launch import ROOT

SCRIPT = ROOT / "examples" / "train_pipeline.py"
TINY = ["--vocab_size=1000", "--max_bytes=1500000", "--seq_len=32", "--dim=32", "--layers=2"]

RANKS = range(4)  # 0 and 1 are the first stage, 2 and 3 the last one.
TIED = [name for name, case in job.CASES.items() if case.get("tied", True)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline")
    run_script(job.__file__, out, ranks=4)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in RANKS]


@pytest.fixture(scope="module", params=job.CASES)
def case(request, seen):
    """Returns the results of a case on each rank, and in one process."""
    case = job.CASES[request.param]
    pipelines = 2 // case.get("tp", 2)
    alone = job.train_alone(case["clip"], case.get("tied", True), pipelines)
    return request.param, [of_rank[request.param] for of_rank in seen], alone


def test_start_is_that_of_one_process(case):
    name, ranks, _ = case
    expected = job.Alone(job.CASES[name].get("tied", True)).layers()
    assert {**ranks[0]["start"], **ranks[2]["start"]}.keys() == expected.keys()
    for rank in RANKS:
        for key, tensor in ranks[rank]["start"].items():
            assert torch.equal(tensor, expected[key]), key


def test_training_is_that_of_one_process(case):
    name, ranks, alone = case
    for rank in RANKS:
        losses, norms = zip(*ranks[rank]["steps"], strict=True)
        assert losses == pytest.approx(alone["losses"], rel=1e-6)
        if job.CASES[name]["stage"] > 0:
            assert norms == pytest.approx(alone["norms"], rel=1e-6)
        for key, tensor in ranks[rank]["state"].items():
            atol = 1e-6 if "embed" in key or key == "0.weight" else 5e-6
            torch.testing.assert_close(tensor, alone["state"][key], rtol=1e-6, atol=atol, msg=key)
    # Clipping takes effect.
    assert min(alone["norms"]) > job.CASES[name]["clip"]


def test_evaluation_is_that_of_one_process(case):
    _, ranks, alone = case
    for rank in RANKS:
        assert ranks[rank]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-6)


@pytest.mark.parametrize("name", TIED)
def test_stages_hold_the_same_table(seen, name):
    first, *others = (seen[rank][name]["state"][job.TABLE] for rank in RANKS)
    assert all(torch.equal(first, other) for other in others)


def test_resumed_run_continues_exactly(case):
    _, ranks, _ = case
    for rank in RANKS:
        assert ranks[rank]["resumed"] == ranks[rank]["expected"]
        for key, tensor in ranks[rank]["state"].items():
            assert torch.equal(ranks[rank]["resumed state"][key], tensor), key


def test_gang_is_that_of_the_engine(case):
    name, ranks, _ = case
    gangs = [[0], [1], [2], [3]] if "DP" in name else [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [ranks[rank]["gang"] for rank in RANKS] == gangs


def test_what_would_go_wrong_is_refused(seen):
    for rank in RANKS:
        refused = seen[rank]["refused"]
        assert "must be sharded by its specs, since it" in refused[1]
        assert refused[1].endswith("Not sharded are ['0'].")
        message = "`zero_optimization.stage` must be 1 for clipping with pipeline stages, but is 0"
        assert refused[2].startswith(message)


def test_example_resumes_exactly(tmp_path):
    def losses(*arguments):
        output = run_script(SCRIPT, *TINY, "--steps=4", *arguments, ranks=4, cwd=tmp_path)
        return re.findall(r"^step (\d+): loss ([\d.]+)", output, re.MULTILINE)

    whole = losses("--checkpoint_every=2")
    assert [step for step, _ in whole] == ["1", "2", "3", "4"]
    assert float(whole[-1][1]) < float(whole[0][1])
    (tmp_path / "runs" / "train_pipeline" / "latest").write_text("global_step2")
    assert losses("--resume") == whole[2:]
