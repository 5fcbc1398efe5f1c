"""Runs the files in `examples/launch/`, on this machine or on hosts of it, and checks their
comments about errors of missing programs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hosts import IFNAME, require
from launch import BIN, ROOT, environment, free_port
from slurm import cluster, require_slurm

LAUNCH = ROOT / "examples" / "launch"
FILES = sorted(path.name for path in LAUNCH.iterdir())
JOB = ROOT / "tests" / "jobs" / "run_directory_job.py"
TIMEOUT = 150
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def header(name):
    """Returns the comments at the top as a line of text."""
    lines = (LAUNCH / name).read_text().splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def check_run(directory, output, launcher, ranks=2):
    assert f"AGREED True {launcher} {ranks} " in output, output
    (run_dir,) = (directory / "outputs").glob("*/*")
    logs = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert logs == [f"rank-0000{rank}.log" for rank in range(ranks)]


@pytest.mark.parametrize("name", FILES)
def test_file_is_valid_and_says_what_it_needs(name):
    path = LAUNCH / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
    assert "set -euo pipefail" in path.read_text()
    assert "Needs: " in header(name)
    assert "Without " in header(name)


@pytest.mark.parametrize(
    ("name", "launcher", "variables"),
    [
        (
            "no_ssh.sh",
            "deepspeed",
            [{"HOSTS": "a b", "RANKS": "1", "NODE_RANK": str(node)} for node in (0, 1)],
        ),
        ("torchrun.sh", "torchrun", [{"NODES": "2", "RANKS": "1"}] * 2),
        ("openmpi.sh", "openmpi", [AS_ROOT]),
    ],
)
def test_run_on_this_machine(name, launcher, variables, tmp_path):
    """Nodes are processes of this machine. `test_run_directory.py` runs `local.sh`."""
    if launcher == "openmpi" and not shutil.which("mpirun"):
        require("mpirun")
    port = str(free_port())
    common = {**environment(), "SCRIPT": str(JOB), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    outputs = [tmp_path / f"output{node}" for node in range(len(variables))]
    processes = [
        subprocess.Popen(
            [LAUNCH / name, "x=3"],
            cwd=tmp_path,
            env=common | own,
            stdout=output.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for own, output in zip(variables, outputs, strict=True)
    ]
    try:
        statuses = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:  # And its children, if it still runs.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    text = "\n".join(output.read_text() for output in outputs)
    assert statuses == [0] * len(processes), text
    check_run(tmp_path, text, launcher)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([LAUNCH / "local.sh"], "exec: deepspeed: not found"),
        ([LAUNCH / "no_ssh.sh"], "deepspeed: command not found"),
        (["env", "-u", "NODE_RANK", LAUNCH / "no_ssh.sh"], "NODE_RANK: must be the index of this"),
        ([LAUNCH / "torchrun.sh"], "exec: torchrun: not found"),
        ([LAUNCH / "openmpi.sh"], "exec: mpirun: not found"),
        (["bash", "-c", f"sbatch {LAUNCH}/slurm.sbatch"], "sbatch: command not found"),
        (["bash", LAUNCH / "slurm.sbatch"], "SLURM_JOB_ID: is not set: submit this file by"),
    ],
)  # fmt: skip
def test_program_that_is_missing_is_named_as_the_file_says(command, message, tmp_path):
    for name in ("bash", "env", "mktemp", "rm"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    env = {"PATH": str(tmp_path), "HOSTS": "a b", "NODE_RANK": "0", "MASTER_ADDR": "a"}
    command = [str(shutil.which(command[0])), *command[1:]]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    file = next(part for part in " ".join(map(str, command)).split() if str(LAUNCH) in part)
    assert message in header(Path(file).name).replace("\\", "")


def test_submitit_without_slurm(tmp_path):
    path = f"{BIN}:{tmp_path}"
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [LAUNCH / "submitit.sh"],
        env={**environment(), "PATH": path, "SCRIPT": str(ROOT / "examples" / "train_lm.py")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (message,) = re.findall(r'Without Slurm: "(.*?slurm cluster\?)"', header("submitit.sh"))
    assert message in done.stderr


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two hosts with ssh and Slurm."""
    require_slurm()
    with cluster(2, tmp_path_factory.mktemp("slurm")) as started:
        yield started


VARIABLES = {"HOSTS": "node1 node2", "RANKS": "1", "IFNAME": IFNAME, "SCRIPT": str(JOB)}


def test_pdsh(nodes, tmp_path):
    require("pdsh")
    env = {**VARIABLES, "MASTER_PORT": str(free_port())}
    (tmp_path / ".deepspeed_env").write_text("# Mine.\n\nTP_EMBED_RUN_ID=of_the_file")
    command = [LAUNCH / "pdsh.sh", "+path=${oc.env:PATH}", "+text='${x} \\${x} `'", "+empty="]
    output = nodes[0].run(command, TIMEOUT, tmp_path, env)
    check_run(tmp_path, output, "deepspeed")
    assert " of_the_file " in output
    (config,) = tmp_path.glob("outputs/*/*/config.yaml")
    saved = OmegaConf.to_container(OmegaConf.load(config))
    assert saved["path"].startswith(environment()["PATH"])
    assert saved["text"] == "1 ${x} `"
    assert saved["empty"] == ""

    without = tmp_path / "bin"
    without.mkdir()
    for name in ("bash", "env", "hostname", "mktemp", "rm", "ssh"):
        (without / name).symlink_to(str(shutil.which(name)))
    command = ["env", f"PATH={BIN}:{without}", LAUNCH / "pdsh.sh"]
    job = nodes[0].start(command, tmp_path, env)
    assert job.wait(TIMEOUT) == 1
    (message,) = re.findall(r'Without pdsh: "(.*?)"', header("pdsh.sh"))
    assert message in job.output
    job = nodes[0].start([LAUNCH / "pdsh.sh"], tmp_path, {**env, "HOSTS": "node9 node2"})
    assert job.wait(TIMEOUT) == 1
    assert "but host=node9 was not reachable via ssh." in job.output
    assert "was not reachable via ssh." in header("pdsh.sh")


def test_openmpi_over_nodes(nodes, tmp_path):
    require("mpirun")
    output = nodes[0].run([LAUNCH / "openmpi.sh"], TIMEOUT, tmp_path, VARIABLES | AS_ROOT)
    check_run(tmp_path, output, "openmpi")


def test_batch_script_of_slurm(nodes, tmp_path):
    command = ["sbatch", "--ntasks-per-node=1", LAUNCH / "slurm.sbatch"]
    nodes[0].run(
        [*command, "hydra.run.dir=outputs/job/${tp_embed.run_id:}"], 30, tmp_path, VARIABLES
    )
    deadline = time.monotonic() + TIMEOUT
    while nodes[0].run(["squeue", "--noheader"]) and time.monotonic() < deadline:
        time.sleep(0.5)
    (log,) = tmp_path.glob("slurm-*.log")
    check_run(tmp_path, log.read_text(), "slurm")
    number = log.stem.removeprefix("slurm-")
    assert (tmp_path / "outputs" / "job" / number).is_dir()


def test_submitit_trains_on_nodes(nodes, tmp_path):
    """Runs `train_lm.py`, whose config has the launcher."""
    env = {"NODES": "2", "RANKS": "1", "SCRIPT": str(ROOT / "examples" / "train_lm.py")}
    command = [LAUNCH / "submitit.sh", "debug=tiny", "embedding=vocab_sharded"]
    nodes[0].run(command, TIMEOUT, tmp_path, env)
    run_dir = tmp_path / "runs" / "train_lm" / "embedding=vocab_sharded"
    assert (run_dir / "result.json").exists()
    assert {path.name for path in (run_dir / "logs").iterdir()} == {
        "rank-00000.log",
        "rank-00001.log",
    }
