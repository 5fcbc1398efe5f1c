from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hosts import ANSWER_SECONDS, IFNAME, OPERATORS, hosts, require
from launch import environment


@pytest.fixture(scope="module")
def nodes():
    require("pdsh", "mpirun")
    with hosts(2) as started:
        yield started


def test_each_host_has_a_name_an_address_and_ssh_to_the_others(nodes):
    for a, b in (nodes, reversed(nodes)):
        assert a.run("hostname; hostname -I").split() == [a.name, a.address]
        assert a.run(["ssh", b.name, "hostname; ls /sys/class/net"]).split() == [
            b.name,
            IFNAME,
            "lo",
        ]


def test_hosts_share_files_but_not_memory_and_local_disks(nodes, tmp_path):
    a, b = nodes
    a.run(f"touch /dev/shm/own {a.local}/own {tmp_path}/shared")
    assert b.run(f"ls /dev/shm {b.local}").split() == ["/dev/shm:", f"{b.local}:"]
    assert b.run("ls", cwd=tmp_path).split() == ["shared"]
    assert not Path("/dev/shm/own").exists()


def test_lock_of_a_compilation_is_of_one_host_and_ends_with_it(nodes):
    a, b = nodes
    a.run(f"mkdir {OPERATORS}/test; touch {OPERATORS}/test/lock")
    assert not Path(OPERATORS, "test").exists()
    assert b.start(["ls", f"{OPERATORS}/test"]).wait(ANSWER_SECONDS) != 0
    a.kill_all()
    assert a.run(["ls", f"{OPERATORS}/test"]) == ""


def test_a_cable_that_was_pulled_can_be_put_back(nodes):
    a, b = nodes
    command = ["ssh", "-o", "ConnectTimeout=2", a.name, "hostname"]
    a.link_down()
    job = b.start(command)
    assert job.wait(ANSWER_SECONDS) == 255
    assert "timed out" in job.output or "No route to host" in job.output
    a.link_up()
    assert b.run(command).split() == [a.name]


def test_killed_host_comes_back_empty(nodes):
    a, b = nodes
    jobs = [b.start("echo here; sleep 1000"), a.start(["ssh", b.name, "sleep 1000"])]
    while jobs[0].output != "here\n" or "sleep 1000" not in b.run("ps ax"):
        assert jobs[0].status is None
    b.kill_all()
    assert [job.wait(ANSWER_SECONDS) for job in jobs] == [-signal.SIGKILL, 255]
    assert "sleep" not in b.run("ps ax")
    assert a.run(["ssh", b.name, "hostname"]).split() == [b.name]


def test_failure_and_time_out_show_the_output(nodes):
    with pytest.raises(AssertionError, match=r"exited with 3:\nthis\n"):
        nodes[0].run("echo this; exit 3")
    with pytest.raises(AssertionError, match=r"took over 1 s:\nthis\n"):
        nodes[0].run("echo this; sleep 1000; echo that", timeout=1)


def test_nothing_is_left_of_a_run_that_was_killed(nodes):
    program = """
from hosts import hosts
with hosts(1) as (a,):
    a.start("sleep 4321")
    print(a.pid, a.local, flush=True)
    input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    pid, local = process.stdout.readline().decode().split()
    host, directory = Path("/proc") / pid, Path(local).parent
    assert (host / "ns").exists()
    assert directory.exists()
    process.kill()
    process.communicate()
    end = time.monotonic() + ANSWER_SECONDS
    while directory.exists() or command_line(pid).startswith("unshare"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "sleep\x004321" not in "".join(map(command_line, os.listdir("/proc")))


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # No process, or not anymore.
        return ""
