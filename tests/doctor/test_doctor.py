"""``tp-embed doctor``: what is wrong is really so, and what it says is compared with the system."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from torch.utils import cpp_extension

from doctor_command import DOCTOR, PATIENCE, Result, doctor
from launch import ROOT, deepspeed_command, environment, free_port, run, start, torchrun_command
from tp_embed.doctor import locks, machine, topology
from tp_embed.doctor.findings import Finding, as_lines, fold, name_ranks
from tp_embed.doctor.job import Job
from tp_embed.doctor.meeting import Meeting
from tp_embed.doctor.versions import is_supported
from tp_embed.launch.environment import Place, find_place
from tp_embed.launch.rendezvous import MeetingError


def test_alone_it_looks_at_the_machine_and_names_what_is_installed(tmp_path):
    result = doctor("--shared", tmp_path, "--config", ROOT / "pyproject.toml")
    assert (result.code, result.data["ok"], result.data["size"]) == (0, True, 1)
    assert result.data["nodes"] == {socket.gethostname(): [0]}
    versions = result.find("Python", "ok")["what"]
    for package in ("torch", "deepspeed", "hydra-core", "transformers", "tp-embed"):
        assert f"{package} {metadata.version(package)}" in versions
    assert f"{len(os.sched_getaffinity(0))} cores" in result.find("/dev/shm has", "ok")["what"]
    assert "tp_embed.integrations.deepspeed" in result.find("can be imported", "ok")["what"]
    result.find("is writable", "ok")
    assert not list(tmp_path.iterdir())
    assert not [each for each in result.bad() if each["level"] == "error"]


@contextmanager
def baton(path):
    """A process that builds what ``path`` is the lock of, as torch's extensions do."""
    path.parent.mkdir(parents=True)
    program = (
        "import sys, time; from torch.utils.file_baton import FileBaton;"
        "assert FileBaton(sys.argv[1]).try_acquire(); print('held', flush=True); time.sleep(600)"
    )
    # `FileBaton` alone, for torch is slow to start.
    program = program.replace(
        "from torch.utils.file_baton", f"sys.path[0] = {str(UTILS)!r}; from file_baton"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


UTILS = Path(metadata.distribution("torch").locate_file("torch/utils"))


def test_extensions_are_looked_for_where_torch_builds_them(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(locks.build_root()) == cpp_extension.get_default_build_root()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(locks.build_root()) == cpp_extension.get_default_build_root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "here"))
    built = cpp_extension._get_build_directory("name", verbose=False)
    assert str(locks.build_root() / "name") == built


def test_stale_locks_are_told_from_held_ones_and_only_they_are_removed_when_asked(tmp_path):
    stale, held = (tmp_path / name / "lock" for name in ("deepspeed_shm_comm", "other"))
    with baton(stale) as killed:
        killed.send_signal(signal.SIGKILL)
    four_hours_ago = time.time() - 4 * 3600
    os.utime(stale, (four_hours_ago, four_hours_ago))
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    with baton(held) as builder:
        result = doctor("--no-bench", ranks=[extensions])
        assert result.code == 1
        finding = result.find(str(stale), "error")
        assert "4 h old" in finding["what"]
        assert f"rm {stale}" in finding["fix"]
        assert f"process {builder.pid}" in result.find(str(held), "note")["what"]
        assert stale.exists()

        result = doctor("--no-bench", "--fix", ranks=[extensions])
        assert result.code == 0
        result.find("was stale, and was removed", "ok")
        assert not stale.exists()
        assert held.exists()


def test_lock_that_cannot_be_removed_is_not_said_to_be_gone(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lock").touch()
    (tmp_path / "b" / "lock").mkdir(parents=True)  # As little a file as root may remove.
    job = job_of(2, lambda rank: "n", locks=locks.look())
    removed = {0: locks.remove(job, 0)}
    assert not (tmp_path / "a" / "lock").exists()
    gone, left = fold(locks.judge(job, removed))
    assert (gone.level, gone.ranks) == ("ok", (0, 1))
    assert f"{tmp_path}/a/lock was stale, and was removed" in gone.what
    assert (left.level, left.ranks) == ("error", (0, 1))
    assert "but it cannot be removed: Is a directory" in left.what


def deepspeed_of_old(*options):
    """It gives `--local_rank=N` to programs, unless it is told not to."""
    command = deepspeed_command("--module", "tp_embed", *options)
    return [word for word in command if word != "--no_local_rank"]


def torchrun(*options):
    return torchrun_command("-m", "tp_embed", *options)


@pytest.mark.parametrize("command", [deepspeed_of_old, torchrun])
def test_launchers_start_it_and_rank_0_prints_a_line_for_each_finding(command, tmp_path):
    output = run(command("doctor", "--tp", "2", "--shared", str(tmp_path)), timeout=PATIENCE)
    lines = output.splitlines()
    (found,) = [line for line in lines if "2 ranks, started by" in line]
    assert found.startswith("ok ")
    assert found.endswith("[all ranks].")
    assert sum("1 gang of 2, each in one node" in line for line in lines) == 1
    for operation in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all"):
        (line,) = [line for line in lines if f"{operation} of all ranks" in line]
        assert "GB/s" in line
    assert not [line for line in lines if line.startswith("error")]
    assert not list(tmp_path.iterdir())


def test_all_ranks_of_a_launcher_fail_when_one_thing_is_wrong():
    process = start(torchrun("doctor", "--tp", 4, "--no-bench"))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "must be a multiple of `--tp`, but that is 4" in output
    assert "use a tensor-parallel size of [1, 2]" in output
    assert "Traceback" not in output.partition("1 error")[0]


def test_ranks_that_differ_are_named_with_what_they_differ_in(tmp_path):
    info = tmp_path / "packages" / "deepspeed-0.18.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.1\n")
    directories = []
    for rank, stage in enumerate((1, 2, 1)):
        directories.append(tmp_path / str(rank))
        directories[-1].mkdir()
        config = {"zero_optimization": {"stage": stage, "offload": {}}, "train_batch_size": 8}
        text = json.dumps(config, indent=rank)  # How it is written does not count.
        (directories[-1] / "ds.json").write_text(text)
    environments = [
        {"OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_xyz"},
        {"OMP_NUM_THREADS": "1", "DS_SKIP_CUDA_CHECK": "1", "GLOO_SOCKET_IFNAME": "eth77"},
        {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(info.parent)},
    ]
    options = ("--config", "ds.json", "--no-bench")
    result = doctor(*options, ranks=environments, cwds=directories)
    assert result.code == 1

    finding = result.find("different versions of deepspeed", "error")
    assert finding["ranks"] == [2]
    assert f"{metadata.version('deepspeed')} on ranks 0-1, 0.18.1 on rank 2" in finding["what"]
    assert result.find("deepspeed must be", "error")["ranks"] == [2]
    finding = result.find("the config differs", "error")
    assert finding["ranks"] == [1]
    assert "zero_optimization.stage is '1' on ranks 0, 2, '2' on rank 1" in finding["what"]
    assert result.find("DS_SKIP_CUDA_CHECK differs", "warning")["ranks"] == [1]
    finding = result.find("names eth77, which is no interface", "error")
    assert finding["ranks"] == [1]
    assert "GLOO_SOCKET_IFNAME" in finding["fix"]
    assert "hf_xyz" not in result.output


def test_rank_that_never_comes_and_one_that_comes_twice_are_named():
    twice = {"RANK": "1", "LOCAL_RANK": "1"}
    result = doctor("--timeout", 12, ranks=[{}, {}, twice], size=3)
    assert result.code == 1
    assert result.find("2 processes connected as rank 1", "error")["ranks"] == [1]
    finding = result.find("did not connect in 12 s", "error")
    assert finding["ranks"] == [2]
    assert f"connected: ranks 0-1 on {socket.gethostname()}" in finding["what"]
    result.find("collectives were not timed", "note")


def sockets_of(process):
    count = 0
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):  # It is closed.
            count += os.readlink(descriptor).startswith("socket:")
    return count


def test_rank_that_ends_in_a_collective_is_named():
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [*DOCTOR, "--timeout", "10", "--json"],
            env={**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        end = time.monotonic() + PATIENCE
        while sockets_of(ranks[1]) < 3:  # To the store, and to rank 0.
            assert ranks[1].poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        ranks[1].kill()
        output, _ = ranks[0].communicate(timeout=PATIENCE)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    result = Result(ranks[0].returncode, output)
    assert result.code == 1
    assert result.find("connected, then stopped answering", "error")["ranks"] == [1]


def test_rank_says_that_rank_0_is_gone():
    port = free_port()
    first = Meeting(Place("none", 0, 2, 0, 2, "127.0.0.1", port), 5)
    other = Meeting(Place("none", 1, 2, 1, 2, "127.0.0.1", port), 5)
    del first
    with suppress(MeetingError):
        other.gather(1)  # What is only sent may be lost unnoticed once.
    for ask in (other.gather, other.share, other.tell):
        with pytest.raises(MeetingError, match="rank 0 stopped answering"):
            ask(1)
    other.end()


def test_port_that_is_taken_is_named():
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        result = doctor("--timeout", 5, ranks=[{"MASTER_PORT": str(port)}], size=2)
    assert result.code == 1
    assert f"= :{port}" in result.find(f"port {port} is taken", "error")["fix"]


def test_versions_are_compared_as_packaging_does():
    for version in ("2.13.0+cpu", "2.12.1", "3.0", "3", "0.19.8", "2.13"):
        for wanted in (">=2.13,<3", "<3,>=2.13.0", "==3.0", "!=0.19.8", ">0.19.7,<=2.13", ""):
            expected = SpecifierSet(wanted).contains(version.partition("+")[0])
            assert is_supported(version, wanted) == expected, (version, wanted)


def test_findings_that_differ_in_their_ranks_are_one_line():
    findings = [Finding("ok", "a", "fine", (rank,)) for rank in (2, 0, 1)]
    findings += [Finding("warning", "b", "slow", (0, 5), "hurry"), Finding("ok", "a", "fine", (7,))]
    nodes = dict.fromkeys(range(4), "here") | dict.fromkeys(range(4, 8), "there")
    assert as_lines(fold(findings), nodes) == [
        "ok       a           fine [ranks 0-2, 7 on here, there].",
        "warning  b           slow [ranks 0, 5 on here, there]. Fix: hurry",
        "1 warning",
    ]
    assert name_ranks([3]) == "rank 3"


def job_of(size, node, **parts):
    """A job of ``size`` ranks, of which each is at ``node(rank)``."""
    alone = find_place({})
    facts = {}
    for rank in range(size):
        there = [r for r in range(size) if node(r) == node(rank)]
        place = replace(
            alone, rank=rank, size=size, local_rank=there.index(rank), local_size=len(there)
        )
        facts[rank] = {"place": vars(place), "node": {"host": node(rank), "key": ""}, **parts}
    return Job(size, facts)


def test_gangs_are_held_against_the_nodes():
    blocks = job_of(16, lambda rank: f"n{rank // 8}")
    assert {each.level for each in topology.judge(blocks, 8)} == {"ok"}
    findings = {each.what: each for each in topology.judge(blocks, 16)}
    (crossing,) = [each for what, each in findings.items() if "crosses nodes" in what]
    assert crossing.ranks == tuple(range(16))
    assert "size of 1 or 2 or 4 or 8 if" in crossing.fix

    dealt = list(topology.judge(job_of(8, lambda rank: f"n{rank % 2}"), 2))
    assert sum("crosses nodes" in each.what for each in dealt) == 4
    (neighbours,) = [each for each in dealt if "ranks 0, 2, 4, 6 of n0" in each.what]
    assert "--map-by slot" in neighbours.fix


def test_what_a_node_lacks_is_said_with_numbers():
    seen = machine.look() | {"device": "cpu", "devices": [], "cores": [0, 1], "threads": 4}
    job = job_of(4, lambda rank: "n", machine=seen | {"shm": 64 * 2**20, "files": (1024, 9999)})
    findings = {each.level: each for each in fold(machine.judge(job)) if each.level == "error"}
    assert "64 MiB free, but 4 ranks take up to 264 MiB" in findings["error"].what
    warnings = {each.what: each.fix for each in machine.judge(job) if each.level == "warning"}
    assert "`ulimit -n 4096`" in next(fix for what, fix in warnings.items() if "1024 files" in what)
    assert "4 ranks compute with 16 threads on 2 cores" in warnings

    gpus = seen | {"device": "cuda", "devices": ["H100"] * 2, "visible": "0,1"}
    job = job_of(3, lambda rank: "n", machine=gpus | {"shm": shutil.disk_usage("/").free})
    (finding,) = [each for each in machine.judge(job) if each.level == "error"]
    assert finding.ranks == (2,)
    assert "it sees 2 (CUDA_VISIBLE_DEVICES is '0,1')" in finding.what
