"""All ranks of a run share one directory, in an app that names it by the time."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
from omegaconf import OmegaConf
from torch.distributed import TCPStore

from launch import ROOT, free_port, run, torchrun_command
from tp_embed.gang import GangError
from tp_embed.integrations.hydra import main, run_start, strip_local_rank
from tp_embed.integrations.hydra.logs import RankFileHandler, log_failure
from tp_embed.launch.environment import Place

JOB = ROOT / "tests" / "jobs" / "run_directory_job.py"


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
    """Started by `deepspeed`, which adds `--local_rank`."""
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
        saved = OmegaConf.to_container(config, resolve=False)  # It is already resolved.
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
    """Rank 0 is waiting for rank 1 at that time."""
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


def test_watchdog_is_told_of_a_failure(tmp_path):
    """Hydra would hide the failure."""
    with pytest.raises(AssertionError, match=r"rank 1 on .* has failed: RuntimeError: this rank"):
        run(torchrun_command(JOB, "fail_on=1", "watch=60"), tmp_path)


def test_process_without_a_launcher_has_a_directory_too(tmp_path):
    output = run([sys.executable, str(JOB)], tmp_path)
    assert "AGREED True none 1" in output
    day = only(tmp_path / "outputs")
    assert datetime.now() - datetime.fromisoformat(day.name) < timedelta(days=2)
    assert files(only(day)) == RUN_FILES[:-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_meet_say_where(rank, monkeypatch):
    monkeypatch.setattr(run_start, "_TIMEOUT", timedelta(seconds=1))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    port = free_port()
    own = run_start.RunStart(datetime.now(), "mine")
    with pytest.raises(GangError, match=f"Rank 1 must meet the others to .*127.0.0.1:{port}"):
        run_start._agree(Place("deepspeed", rank, 2, 0, 1, "127.0.0.1", port), own)
    run_start.close_server()
    with pytest.raises(GangError, match=r"the address of rank 0 is unknown\. Fix: set MASTER_ADDR"):
        run_start._agree(Place("none", rank, 2, 0, 1, None, None), own)


def test_port_that_another_program_has_is_named(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    own = run_start.RunStart(datetime.now(), "mine")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(GangError, match=f"port {port} is taken by another process"):
            run_start._agree(Place("deepspeed", 0, 2, 0, 1, "127.0.0.1", port), own)


def test_ranks_that_torchrun_starts_again_have_the_directory_that_they_had(monkeypatch):
    """Torchrun's store outlives ranks, so rank 1 may find keys of an earlier rank 0."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def agree(rank):
        own = run_start.RunStart(datetime.now(), f"of rank {rank} in attempt {attempt}")
        return run_start._agree(Place("torchrun", rank, 2, rank, 2, "127.0.0.1", store.port), own)

    found = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with ThreadPoolExecutor() as pool:
            last = pool.submit(agree, 1)
            if attempt == "0":
                time.sleep(0.2)
            else:
                last.result(timeout=60)
            found += [pool.submit(agree, 0).result(timeout=60), last.result(timeout=60)]
    run_start.close_server()
    assert {each.id for each in found} == {"of rank 0 in attempt 0"}
    assert len(set(found)) == 1


def test_failure_of_a_function_that_was_given_a_config_is_its_own(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    @main()
    def app(config):
        raise RuntimeError(f"{config.x} fails")

    with pytest.raises(RuntimeError, match="this fails"):
        app(OmegaConf.create({"x": "this"}))


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


@pytest.mark.parametrize(("code", "is_failure"), [(0, False), (None, False), (3, True)])
def test_exit_is_a_failure_if_its_code_says_so(code, is_failure, tmp_path):
    handler = RankFileHandler(str(tmp_path / "logs" / "rank-00000.log"))
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(SystemExit), log_failure():
            sys.exit(code)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    text = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert ("SystemExit" in text) == is_failure
