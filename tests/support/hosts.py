"""Several hosts on this machine, each with its own network, name, processes, /dev/shm and sshd.

    with hosts(2) as (a, b):
        assert a.run(["ssh", b.name, "hostname"]).strip() == b.name
        job = b.start([sys.executable, "job.py"], cwd=tmp_path, env={"GLOO_SOCKET_IFNAME": IFNAME})
        b.link_down()  # Pulls its cable: packets are lost, and nobody is told.
        b.kill_all()  # Kills all its processes at once, and restarts sshd.
        status = job.wait(timeout=60)
        print(job.output)

A host is a set of Linux namespaces. Hosts share the file system, as over NFS, except `/dev/shm`,
`/run`, DeepSpeed's compiled operators, and `host.local`, an empty directory.
`ssh` works between hosts without options (so pdsh and mpirun do), as root, with a key made for
them; the user's `~/.ssh` is neither read nor written. Commands of ``run`` and ``start`` have the
environment of `launch.environment()`; commands over ssh have none of it, as on a real host.

A host ends with its first process, which ends with the process that called ``hosts``, for any
cause: nothing is left behind, and the machine's own network is never touched.

``require("pdsh")`` skips a test if hosts or pdsh are not available, and says what to install; with
`TP_EMBED_REQUIRE_HOSTS=1` it fails the test instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from launch import ROOT, environment

IFNAME = "eth0"  # The same on every host.
ANSWER_SECONDS = 30  # For immediate answers, unless the machine is busy.

PACKAGES = {
    "ip": "iproute2",
    "mpirun": "openmpi-bin",
    "nsenter": "util-linux",
    "pdsh": "pdsh",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# DeepSpeed's compiled operators. A process killed while loading one leaves a lock that all others
# wait for: each host has a copy.
OPERATORS = environment()["TORCH_EXTENSIONS_DIR"]
UNLOCK = f"rm -f {OPERATORS}/*/lock"
KINDS = ["--net", "--mount", "--uts", "--ipc"]  # Of namespaces; and one of processes.

SSHD_CONFIG = """
Port 22
HostKey {0}/host_key
AuthorizedKeysFile {0}/user_key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 100
Subsystem sftp internal-sftp
PidFile /run/sshd.pid
"""
SSH_CONFIG = """
IdentityFile {0}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
BatchMode yes
ConnectTimeout 10
LogLevel ERROR
"""
FIRST = f"""
set -e
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs {{0}}/local
mount --bind {{0}}/hosts_of_{{name}} /etc/hosts
mount --bind {{0}}/ssh_config /etc/ssh/ssh_config
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
if [ -d {OPERATORS} ]; then
    cp -a {OPERATORS} /run/operators
    mount --bind /run/operators {OPERATORS}
    {UNLOCK}
fi
mkdir /run/sshd
hostname {{name}}
ip link set lo up
# Waits for the end of its input. Orphans that end leave no zombies with it.
exec {sys.executable} -IS -c '
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()'
"""
SWITCH = """
set -e
ip link add switch type bridge
ip link set switch up
echo ready
cat > /dev/null
rm -rf {0}
"""
SERVE = """
set -e
rm -f /run/sshd.pid
"$(command -v sshd)" -f {0}/sshd_config
while [ ! -s /run/sshd.pid ]; do sleep 0.02; done
"""


def why_not(*programs: str) -> str:
    """Returns why hosts with ``programs`` are not available, and what to do; empty if they are."""
    needed = {"ip", "nsenter", "ssh", "sshd", "unshare", *programs}
    missing = {PACKAGES[program] for program in needed if not shutil.which(program, path=PATH)}
    if missing:
        return f"several hosts need programs: apt-get install {' '.join(sorted(missing))}"
    if os.geteuid() != 0:
        return "several hosts need root, who alone may make networks"
    command = ["unshare", *KINDS, "--pid", "--fork", "--mount-proc", "mount", "-t", "sysfs", "s"]
    tried = subprocess.run([*command, "/sys"], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"several hosts need `docker run --privileged` or the like: {tried.stderr.strip()}"
    return ""


def require(*programs: str) -> None:
    """Skips the test, or fails it if hosts are required, if hosts with ``programs`` are not
    available."""
    if reason := why_not(*programs):
        if os.environ.get("TP_EMBED_REQUIRE_HOSTS") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


class Job:
    """A command that runs on a host."""

    def __init__(self, what: str, process: subprocess.Popen[bytes], output: Path) -> None:
        self.what, self._process, self._output = what, process, output

    @property
    def output(self) -> str:
        """Its output so far, stdout and stderr."""
        return self._output.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        """Returns its exit status; None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        """Waits for its exit status. After ``timeout`` seconds, kills it and fails the test."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.what} took over {timeout} s:\n{self.output}") from None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to its process group, which does not reach processes started over ssh."""
        pid = self._process.pid
        with suppress(FileNotFoundError, ProcessLookupError):
            inside = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            os.killpg(os.getpgid(int(inside[0]) if inside else pid), number)
        if number == signal.SIGKILL:
            self._process.wait(ANSWER_SECONDS)


def hold(stack: ExitStack, directory: Path, name: str, options: Sequence[str], script: str) -> int:
    """Runs ``script`` in new namespaces, until the stack or this process ends. Returns a process of
    this machine inside them."""
    errors = directory / f"{name}_errors"
    with errors.open("wb") as file:
        process = subprocess.Popen(
            ["unshare", *options, "--pid", "--fork", "--kill-child", "sh", "-c", script],
            stdin=subprocess.PIPE,  # Its end ends the script.
            stdout=subprocess.PIPE,
            stderr=file,
            env={"PATH": PATH},
            start_new_session=True,  # Protected from ^C in a terminal.
        )
    stack.callback(process.communicate)  # Closes it, and waits.
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise RuntimeError(f"{name} did not start: {errors.read_text()}")
    return process.pid


class Host:
    """A host ``name``, whose interface `IFNAME` has ``address``."""

    def __init__(self, name: str, address: str, directory: Path, pid: int, switch: int) -> None:
        self.name, self.address, self.pid = name, address, pid
        self.local = directory / "local"  # The same path on every host, but different directories.
        self._directory, self._switch, self._jobs = directory, switch, 0
        # Creates both ends in their namespaces.
        self._in_switch("add", self.name, "type", "veth", "peer", IFNAME, "netns", str(pid))
        self._in_switch("set", self.name, "master", "switch", "up")
        self.run(f"ip addr add {address}/24 dev {IFNAME}; ip link set {IFNAME} up")
        self._serve()

    def start(
        self,
        command: Sequence[object] | str,
        cwd: Path | str = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """Starts ``command``, a list, or a string for a shell, with ``env`` added to the
        environment."""
        words = ["sh", "-c", command] if isinstance(command, str) else list(map(str, command))
        enter = ["nsenter", f"--target={self.pid}", *KINDS]
        enter.append(f"--pid=/proc/{self.pid}/ns/pid_for_children")
        self._jobs += 1
        output = self._directory / f"{self.name}_{self._jobs}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*enter, "sh", "-c", 'cd "$0" && exec setsid "$@"', str(cwd), *words],
                env={**environment(), "PATH": f"{environment()['PATH']}:/usr/sbin:/sbin"}
                | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Job(f"{' '.join(words)} on {self.name}", process, output)

    def run(
        self,
        command: Sequence[object] | str,
        timeout: float = ANSWER_SECONDS,
        cwd: Path | str = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Returns the output of ``command``; a failure or timeout fails the test with it."""
        job = self.start(command, cwd, env)
        status = job.wait(timeout)
        assert status == 0, f"{job.what} exited with {status}:\n{job.output}"
        return job.output

    def link_down(self) -> None:
        """Unplugs its cable from the switch: the host keeps its interface and address."""
        self._in_switch("set", self.name, "down")

    def link_up(self) -> None:
        self._in_switch("set", self.name, "up")

    def kill_all(self) -> None:
        """Kills all processes on the host, and restarts sshd."""
        self.run(f"kill -9 -1; sleep 0.1; {UNLOCK}")
        self._serve()

    def _serve(self) -> None:
        self.run(SERVE.format(self._directory))

    def _in_switch(self, *words: str) -> None:
        command = ["nsenter", f"--target={self._switch}", "--net", "ip", "link", *words]
        subprocess.run(command, check=True, timeout=ANSWER_SECONDS, env={"PATH": PATH})


@contextmanager
def hosts(count: int, *, loopback_names: bool = False) -> Iterator[list[Host]]:
    """Starts ``count`` hosts, named node1, node2, ..., on one switch. With ``loopback_names``, a
    host resolves its own name to 127.0.1.1, as Debian's and Ubuntu's installers set up."""
    addresses = {f"node{i}": f"10.77.0.{i}" for i in range(1, count + 1)}
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="hosts_"))
        switch = hold(stack, directory, "switch", ["--net"], SWITCH.format(directory))
        (directory / "local").mkdir()
        (directory / "ssh_config").write_text(SSH_CONFIG.format(directory))
        (directory / "sshd_config").write_text(SSHD_CONFIG.format(directory))
        for key in ("host_key", "user_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)]
            subprocess.run(make, check=True, timeout=ANSWER_SECONDS)

        def start(name: str, address: str) -> Host:
            known = addresses | ({name: "127.0.1.1"} if loopback_names else {})
            lines = ["127.0.0.1 localhost", *(f"{where} {who}" for who, where in known.items()), ""]
            (directory / f"hosts_of_{name}").write_text("\n".join(lines))
            script = FIRST.format(directory, name=name)
            pid = hold(stack, directory, name, [*KINDS, "--mount-proc"], script)
            return Host(name, address, directory, pid, switch)

        yield [start(name, address) for name, address in addresses.items()]
