"""Jobs where a rank or a node dies, stops, hangs or is cut off end everywhere, name the missing
rank, and resume on the remaining nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

import failure_job as job
import watchdog_job
from hosts import IFNAME, Host, Job, hosts, require
from launch import BIN, deepspeed_command, environment, free_port, run
from tp_embed import GangError
from tp_embed.integrations.deepspeed.config import read_section
from tp_embed.watchdog import EXIT_CODE, Watchdog
from tp_embed.watchdog.hub import Hub
from tp_embed.watchdog.link import Link, Lost

TIMEOUT = 10  # The watchdog's timeout, in seconds.
MARGIN = 20  # For a busy machine.
# DeepSpeed's launcher waits for ssh, which by default waits for a missing host.
SSH_OPTIONS = "-o ServerAliveInterval=3 -o ServerAliveCountMax=3"


def test_what_the_watchdog_refuses():
    with pytest.raises(ValueError, match="must be at least 1 second, but is 0"):
        Watchdog.start(timedelta(milliseconds=500))
    with pytest.raises(GangError, match="must be initialised before the watchdog starts"):
        Watchdog.start(60)
    for section, said in (
        (
            {"timeouts": 60},
            r"`tp_embed.watchdog.timeouts` is not a key .*`tp_embed.watchdog` has t",
        ),
        ({"timeout": "60"}, r"`tp_embed.watchdog.timeout` of the DeepSpeed config is '60'"),
        ({"timeout": 0}, r"`tp_embed.watchdog.timeout` of the DeepSpeed config is 0"),
        (60, r"`tp_embed.watchdog` of the DeepSpeed config is 60"),
    ):
        with pytest.raises(ValueError, match=said):
            read_section({"tp_embed": {"watchdog": section}})


def test_the_hub_takes_each_rank_once_and_nobody_else():
    hub = Hub(1, timeout=10, beat=1, token="right")
    thread = threading.Thread(target=hub.run, daemon=True)
    thread.start()

    def come(**message: object) -> Link:
        link = Link(socket.create_connection(("127.0.0.1", hub.port), timeout=5))
        link.send(message)
        return link

    def is_turned_away(link: Link) -> bool:
        with suppress(Lost):
            for _ in range(100):
                link.receive()
                time.sleep(0.05)
            return False
        return True

    assert is_turned_away(come(token="wrong", rank=0, name="a stranger"))
    assert is_turned_away(come(token="right", rank=1, name="of a larger job"))
    rank = come(token="right", rank=0, name="rank 0")
    time.sleep(0.5)
    assert is_turned_away(come(token="right", rank=0, name="rank 0 again"))
    rank.send({"leaves": True})
    thread.join(10)
    assert not thread.is_alive()
    hub.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Host]]:
    require("pdsh")
    with hosts(2) as made:
        yield made


def until(done: Callable[[], bool], seconds: float, what: Callable[[], str]) -> float:
    """Waits until ``done()``; returns the seconds it took."""
    begin = time.monotonic()
    while not done():
        if time.monotonic() - begin > seconds:
            raise AssertionError(f"It took over {seconds} s:\n{what()}")
        time.sleep(0.1)
    return time.monotonic() - begin


def processes(directory: Path) -> dict[int, str]:
    """Returns the processes of the job of ``directory`` on all hosts: the command of each pid."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended.
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(directory) in command:
                found[int(process.name)] = command
    return found


def ranks(directory: Path) -> dict[int, int]:
    """Returns the pid of each rank."""
    found = {}
    for pid, command in processes(directory).items():
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = [value[5:] for value in variables if value.startswith(b"RANK=")]
            if rank and f"-u {job.__file__}" in command:
                found[int(rank[0])] = pid
    return found


def records(directory: Path, rank: int) -> list[dict[str, float]]:
    file = directory / f"rank{rank}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def train(nodes: list[Host], directory: Path, launcher: str = "deepspeed") -> list[Job]:
    """Starts a job with two ranks per node, and waits until it has trained some steps after its
    checkpoint."""
    first, _ = nodes
    variables = environment()
    names = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH", "TORCH_EXTENSIONS_DIR")
    env = {name: variables[name] for name in names} | {"GLOO_SOCKET_IFNAME": IFNAME}
    options = [job.__file__, directory, f"timeout={TIMEOUT}"]
    if launcher == "deepspeed":
        (directory / "hostfile").write_text("".join(f"{node.name} slots=2\n" for node in nodes))
        (directory / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in env.items()))
        command = [
            BIN / "deepspeed",
            f"--hostfile={directory}/hostfile",
            f"--master_addr={first.address}",
            f"--master_port={free_port()}",
            "--no_local_rank",
        ]
        env["PDSH_SSH_ARGS_APPEND"] = SSH_OPTIONS
        jobs = [first.start([*command, *options], cwd=directory, env=env)]
    else:
        endpoint = f"{first.address}:{free_port()}"
        command = [BIN / "torchrun", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        command.append(f"--rdzv-endpoint={endpoint}")
        jobs = [
            node.start([*command, f"--local-addr={node.address}", *options], cwd=directory, env=env)
            for node in nodes
        ]
    until(
        lambda: (
            all(len(records(directory, rank)) > job.SAVED + 4 for rank in range(4))
            or any(job.status is not None for job in jobs)
        ),
        300,
        lambda: "\n".join(job.output for job in jobs),
    )
    assert all(job.status is None for job in jobs), "\n".join(job.output for job in jobs)
    return jobs


def ends(directory: Path, jobs: list[Job], within: float) -> str:
    """Checks that all ranks, then all launchers, end with a failure; returns their output."""

    def output() -> str:
        return f"left: {processes(directory)}\n" + "\n".join(job.output for job in jobs)

    until(lambda: not ranks(directory), within + MARGIN, output)
    until(lambda: not processes(directory), MARGIN + 30, output)
    assert all(job.wait(MARGIN) != 0 for job in jobs)
    return output()


def on(rank: int) -> str:
    """Returns a pattern for a rank, with its host."""
    return rf"rank {rank} on node{rank // 2 + 1} \(pid \d+\)"


def waits(rank: int, *gangs: list[int]) -> str:
    """Returns a pattern for a rank that waits in one of these gangs, or in the gang of all ranks,
    or did so until it failed."""
    gang = "|".join(re.escape(str(gang)) for gang in (*gangs, [0, 1, 2, 3]))
    place = rf"`\w+` of .*, collective \d+ of the gang of ranks ({gang}) \(\w+\)"
    return rf"{on(rank)} (has been in|failed in|is in .* last was) {place}"


def one_waits(output: str, pairs: dict[int, int]) -> bool:
    """Returns whether the verdict says that a rank waits for the other one of its pair."""
    return any(
        re.search(rf"{waits(rank, [rank, other])}.*; missing there: ranks? .*{other}", output)
        for rank, other in pairs.items()
    )


def test_a_killed_rank_ends_the_job_on_all_nodes(nodes, tmp_path):
    jobs = train(nodes, tmp_path)
    os.kill(ranks(tmp_path)[3], signal.SIGKILL)
    output = ends(tmp_path, jobs, within=0)
    for rank in (0, 1):
        said = rf"\[tp_embed watchdog\] {on(3)} died: its connection was closed\n.*Here: "
        assert re.search(said + waits(rank, [0, 1], [rank, rank + 2]), output)


def test_a_stopped_rank_ends_the_job_on_all_nodes(nodes, tmp_path):
    jobs = train(nodes, tmp_path, launcher="torchrun")
    os.kill(ranks(tmp_path)[3], signal.SIGSTOP)
    output = ends(tmp_path, jobs, within=TIMEOUT)
    silent = rf"{on(3)} has not been heard from for [\d.]+ s, but its host answers: the process is"
    assert re.search(rf"\[tp_embed watchdog\] missing: rank 3\n.*{silent} stopped", output)
    assert one_waits(output, {1: 3, 2: 3})
    assert f"ends with exit code {EXIT_CODE}" in output


@pytest.fixture(scope="module")
def cut_off(nodes, tmp_path_factory):
    """Returns the rest of a job after cutting off a node, and its output."""
    directory = tmp_path_factory.mktemp("cut_off")
    jobs = train(nodes, directory)
    nodes[1].link_down()
    try:
        return directory, ends(directory, jobs, within=TIMEOUT)
    finally:
        nodes[1].link_up()


def test_a_node_that_is_cut_off_ends_the_job_on_both_sides(cut_off):
    directory, output = cut_off
    silent = r"has not been heard from for [\d.]+ s, and nor has its host"
    assert "[tp_embed watchdog] missing: ranks 2, 3\n" in output
    assert all(re.search(rf"{on(rank)} {silent}", output) for rank in (2, 3))
    assert one_waits(output, {0: 2, 1: 3})
    # Their output reaches no terminal, but a log. (The launcher ends one rank when the
    # other has ended.)
    logs = "\n".join((directory / f"rank{rank}.log").read_text() for rank in (2, 3))
    assert re.search(
        rf"missing: rank 0\n  rank 0 on node1, which hears of all ranks, {silent}", logs
    )
    assert re.search(waits(2, [0, 2], [2, 3]), logs) or re.search(waits(3, [1, 3], [2, 3]), logs)


@pytest.fixture(scope="module")
def losses():
    """Returns the losses of a run without failures, in one process of plain torch."""
    return job.train_alone(2 * job.SAVED)


def losses_of(directory: Path, size: int) -> dict[int, float]:
    """Returns the losses of the steps that all ranks completed."""
    found = [{r["step"]: r["loss"] for r in records(directory, rank)} for rank in range(size)]
    steps = set.intersection(*map(set, found))
    assert all(other[step] == found[0][step] for step in steps for other in found)
    return {step: found[0][step] for step in steps}


@pytest.mark.parametrize("tp_size", [2, 1])
def test_the_last_checkpoint_resumes_on_what_is_left(nodes, cut_off, tmp_path, losses, tp_size):
    directory, _ = cut_off
    before = losses_of(directory, 4)
    assert [before[step] for step in range(len(losses))] == pytest.approx(losses, rel=1e-5)

    command = [sys.executable, "-m", "tp_embed", "convert", directory / "checkpoints", "left"]
    command += ["--to=deepspeed", "--zero-stage=1", "--dp=1", f"--tp={tp_size}", "--quiet"]
    nodes[0].run(command, timeout=100, cwd=tmp_path)
    options = ["load=left", f"steps={job.SAVED}", f"timeout={TIMEOUT}"]
    command = deepspeed_command(job.__file__, tmp_path, *options, ranks=tp_size)
    nodes[0].run(command, timeout=200, cwd=tmp_path)
    after = losses_of(tmp_path, tp_size)
    assert after == pytest.approx(dict(enumerate(losses[job.SAVED :], job.SAVED)), rel=1e-5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns the output of each pair of watchdog_job.py, and how its ranks ended."""
    directory = tmp_path_factory.mktemp("pairs")
    run([sys.executable, watchdog_job.__file__, str(directory)])
    seen = json.loads((directory / "seen.json").read_text())
    print(seen)
    return {what: ((directory / f"{what}.txt").read_text(), ends) for what, ends in seen.items()}


def test_nothing_ends_a_job_without_failures(pairs):
    output, ends = pairs["rest"]
    assert {ends["0"][0], ends["1"][0]} == {0}, output
    assert "rank 0 is done" in output
    assert "rank 1 is done" in output
    assert "watchdog]" not in output


@pytest.mark.parametrize(
    ("what", "missing", "code", "said"),
    [
        ("hang", 1, EXIT_CODE, r"{} is in watchdog_job.py:\d+ `do`, in no collective"),
        ("keep", 1, -signal.SIGKILL, r"{} has not .* host answers: .* or lets no thread run"),
        ("exit", 1, 0, r"{} has left: it came to its end"),
        ("raise", 1, EXIT_CODE, r"{} has failed: ValueError: a bug"),
        ("caught", 1, EXIT_CODE, r"{} has failed: ValueError: a bug"),
        ("orphan", 1, -signal.SIGKILL, r"{} died: its connection was closed"),
        ("kill", 0, -signal.SIGKILL, r"{}, which hears of all ranks, died: its connection was"),
        ("stop", 0, -signal.SIGKILL, r"{}, which .* host answers: the process is stopped"),
    ],
)
def test_the_missing_rank_is_named_and_all_end(pairs, what, missing, code, said):
    output, ends = pairs[what]
    name = "rank {} on \\S+" if missing == 0 else "rank {} on \\S+ \\(pid \\d+\\)"
    said = said.format(name.format(missing))
    assert re.search(rf"missing: rank {missing}\n.*\n?.*{said}", output), output
    place = r"`all_gather` of \(4,\) Float, collective \d+ of the gang of ranks \[0, 1\]"
    other = (
        rf"rank {1 - missing} on \S+ \(pid \d+\) (has been in|failed in|is in .* last was) {place}"
    )
    assert re.search(other, output), output
    assert ("\nValueError: a bug" in output or "]: ValueError: a bug" in output) == (
        what in ("raise", "caught")
    )
    assert ends[str(missing)][0] == code, output
    assert ends[str(1 - missing)][0] == EXIT_CODE, output
