"""A Slurm cluster on several hosts of this machine, from Debian's packages.

    with cluster(2) as (a, b):
        a.run(["sbatch", "--wait", "--nodes=2", "job.sh"], cwd=tmp_path, timeout=60)

The first host also runs the controller. Each host runs munge, which authenticates with one key.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hosts import PATH, Host, hosts, require

CPUS = 4  # Slurm's figures of a host.

CONFIG = """
ClusterName=tests
SlurmctldHost={controller.name}({controller.address})
SlurmUser=root
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile={local}/slurmctld.log
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile={local}/slurmd.log
StateSaveLocation={local}/state
SlurmdSpoolDir={local}/spool
SlurmdParameters=config_overrides
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=2
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""
MUNGE = """
set -e
mkdir -p /run/munge && chmod 755 /run/munge && chown munge /run/munge
install -m 400 -o munge {key} /run/munge/key
setpriv --reuid=munge --regid=munge --clear-groups munged --key-file=/run/munge/key \\
    --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid --seed-file=/run/munge/seed \\
    --log-file=/run/munge/log
"""


def require_slurm() -> None:
    """Skips the test, or fails it if hosts are required, if no cluster is available."""
    require()
    programs = ("munged", "sbatch", "slurmctld", "slurmd", "setpriv")
    if missing := [name for name in programs if not shutil.which(name, path=PATH)]:
        reason = f"no {', '.join(missing)}: apt-get install slurm-wlm"
        if os.environ.get("TP_EMBED_REQUIRE_HOSTS") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@contextmanager
def cluster(count: int, directory: Path) -> Iterator[list[Host]]:
    """Starts ``count`` hosts, ready to run jobs; ``directory`` gets their config."""
    with hosts(count) as nodes:
        controller = nodes[0]
        config = directory / "slurm.conf"
        lines = [f"NodeName={n.name} NodeAddr={n.address} CPUs={CPUS} State=UNKNOWN" for n in nodes]
        config.write_text(
            CONFIG.format(controller=controller, local=controller.local, nodes="\n".join(lines))
        )
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        for node in nodes:
            node.run(MUNGE.format(key=key))
            node.run(f"mkdir {node.local}/state {node.local}/spool")
            # The default path, so that commands need no variable.
            node.run(f"mount -t tmpfs tmpfs /etc/slurm && cp {config} /etc/slurm/slurm.conf")
            # The plugin of the other version needs systemd on start.
            node.run("echo CgroupPlugin=cgroup/v1 > /etc/slurm/cgroup.conf")
        controller.run("slurmctld")
        for node in nodes:
            node.run("slurmd")
        _wait_until_idle(controller, count)
        yield nodes


def _wait_until_idle(controller: Host, count: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        states = controller.run(["sinfo", "--noheader", "--Node", "--format=%t"]).split()
        if states == ["idle"] * count:
            return
        if time.monotonic() > deadline:
            log = controller.run(f"tail -n 50 {controller.local}/*.log; sinfo -N -o '%N %T %E'")
            raise AssertionError(f"Slurm's nodes are {states} after a minute:\n{log}")
        time.sleep(0.2)
