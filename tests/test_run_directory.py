"""One directory for all ranks of a run, by an app that names it by the time."""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta

import pytest
from omegaconf import OmegaConf

from launch import ROOT, free_port, run, torchrun_command
from tp_embed.gang import GangError
from tp_embed.integrations.hydra import run_start, strip_local_rank
from tp_embed.launcher import Place

JOB = ROOT / "tests" / "run_directory_job.py"


def only(directory):
    (found,) = directory.iterdir()
    return found


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


RUN_FILES = [
    ".hydra/config.yaml",
    ".hydra/hydra.yaml",
    ".hydra/overrides.yaml",
    "config.yaml",
    "logs/rank-00000.log",
    "logs/rank-00001.log",
]


def test_all_jobs_of_a_sweep_are_in_one_directory(tmp_path, monkeypatch):
    """By `deepspeed`, which adds `--local_rank`."""
    monkeypatch.setenv("SCRIPT", str(JOB))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    output = run([str(ROOT / "examples" / "launch" / "local.sh"), "--multirun", "x=1,2"], tmp_path)
    assert output.count("AGREED True deepspeed 2") == 2

    sweep = only(tmp_path / "multirun")
    first, second = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert first.name.startswith("0-")
    assert second.name.startswith("1-")
    assert files(first) == files(second) == RUN_FILES
    for x, directory in ((1, first), (2, second)):
        assert OmegaConf.load(directory / ".hydra" / "overrides.yaml") == [f"x={x}"]
        config = OmegaConf.load(directory / "config.yaml")
        saved = OmegaConf.to_container(config, resolve=False)  # It is resolved already.
        assert saved["x"] == x
        assert saved["started"] == f"{sweep.name}-{directory.name.partition('-')[2]}"
        for rank in (0, 1):
            log = (directory / "logs" / f"rank-0000{rank}.log").read_text()
            assert f"x is {x} on rank {rank}" in log
            assert f"said by DeepSpeed on rank {rank}" in log
            assert f"rank {1 - rank}" not in log
    assert "x is 1 on rank 0" in output
    assert "on rank 1" not in output  # The console is for rank 0.


def test_failure_is_in_the_log_of_its_rank_and_ends_the_sweep(tmp_path, monkeypatch):
    """Rank 0 is waiting for rank 1 then."""
    monkeypatch.setenv("TP_EMBED_RUN_ID", "mine")
    overrides = ["x=1,2", "fail_on=1", "hydra.sweep.dir=outputs/${tp_embed.run_id:}"]
    with pytest.raises(AssertionError, match=r"AGREED True torchrun 2 .*/outputs/mine/0-\d+ mine"):
        run(torchrun_command(JOB, "--multirun", *overrides), tmp_path)
    directory = tmp_path / "outputs" / "mine"
    assert sorted(path.name.partition("-")[0] for path in directory.iterdir()) == [
        "0",
        "multirun.yaml",
    ]
    (first,) = directory.glob("0-*")
    assert files(first) == RUN_FILES
    logs = [(first / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)]
    assert "RuntimeError: this rank fails" in logs[1]
    assert "this rank fails" not in logs[0]


def test_process_without_a_launcher_has_a_directory_too(tmp_path):
    output = run([sys.executable, str(JOB)], tmp_path)
    assert "AGREED True none 1" in output
    day = only(tmp_path / "outputs")
    assert datetime.now() - datetime.fromisoformat(day.name) < timedelta(days=2)
    assert files(only(day)) == RUN_FILES[:-1]


@pytest.mark.parametrize(("rank", "who"), [(0, r"Ranks \[1\]"), (1, "Rank 1")])
def test_ranks_that_do_not_meet_say_where(rank, who, monkeypatch):
    monkeypatch.setattr(run_start, "_TIMEOUT", timedelta(seconds=1))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    port = free_port()
    own = run_start.RunStart(datetime.now(), "mine")
    with pytest.raises(GangError, match=f"{who} must reach rank 0 at 127.0.0.1:{port} to agree"):
        run_start._agree(Place("deepspeed", rank, 2, 0, 1, "127.0.0.1", port), own)
    run_start.close_server()
    with pytest.raises(ValueError, match="`MASTER_ADDR` and `MASTER_PORT` must be where rank 0"):
        run_start._agree(Place("none", rank, 2, 0, 1, None, None), own)


@pytest.mark.parametrize("given", ["--local_rank=3", "--local-rank=3", "--local_rank 3"])
def test_local_rank_is_taken_out_of_the_arguments(given, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    argv = ["app.py", *given.split(), "x=1", "--local_ranks=4"]
    strip_local_rank(argv)
    assert argv == ["app.py", "x=1", "--local_ranks=4"]
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.setenv("LOCAL_RANK", "1")
    strip_local_rank(["app.py", *given.split()])
    assert os.environ["LOCAL_RANK"] == "1"
