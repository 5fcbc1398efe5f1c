"""Reads the launcher of this process, and its rank, from environment variables.

``deepspeed`` and ``torchrun`` set the variables that torch.distributed reads, Open MPI sets
``OMPI_COMM_WORLD_*``, Slurm's ``srun`` sets ``SLURM_*``.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Place:
    """The place of a process in its run.

    ``local_size`` is the number of ranks on this node, or ``None`` if unknown. Rank 0 listens at
    ``master_addr`` and ``master_port``. The port is ``None`` for a single process; both are if the
    launcher leaves them to the program.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    master_addr: str | None
    master_port: int | None

    def __post_init__(self) -> None:
        local_size = self.size if self.local_size is None else self.local_size
        for name, value, bound in (
            ("rank", self.rank, self.size),
            ("local rank", self.local_rank, local_size),
            ("number of ranks on this node", local_size - 1, self.size),
        ):
            if not 0 <= value < bound:
                raise ValueError(
                    f"The {name} that {_TITLES[self.launcher]} gives must fit the number of ranks, "
                    f"but the launcher gave {self}. Start the program by one launcher only, in an "
                    "environment without variables of another run."
                )

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Sets missing variables that torch.distributed and DeepSpeed read. After that,
        ``deepspeed.init_distributed()`` doesn't need mpi4py."""
        port = self.master_port
        if port is None and self.size == 1:
            port = _free_port()
        variables = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_SIZE": self.local_size,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": port,
        }
        for name, value in variables.items():
            if value is not None:
                environ.setdefault(name, str(value))


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """Finds the place of this process.

    Without a launcher, uses ``RANK`` and ``WORLD_SIZE``; without these, the process is alone.
    ``MASTER_ADDR`` and ``MASTER_PORT`` take precedence over derived values.

    :raises ValueError: a variable is missing or does not fit the others; or Open MPI started
        processes on several nodes and ``MASTER_ADDR`` is needed to find rank 0.
    """
    if "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ:
        return _from_torch("torchrun", environ)
    if "CROSS_RANK" in environ and "RANK" in environ:
        return _from_torch("deepspeed", environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_openmpi(environ)
    # A batch script has a SLURM_PROCID too, but is no task of a step.
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and not _is_in_shell(environ):
        return _from_slurm(environ)
    if "RANK" in environ:
        return _from_torch("none", environ)
    return Place("none", 0, 1, 0, 1, "127.0.0.1", None)


def _from_torch(launcher: str, environ: Mapping[str, str]) -> Place:
    size = _integer(launcher, environ, "WORLD_SIZE")
    local_size = None
    if size == 1 or "LOCAL_WORLD_SIZE" in environ or "LOCAL_SIZE" in environ:
        local_size = _integer(launcher, environ, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=size)
    return Place(
        launcher,
        _integer(launcher, environ, "RANK"),
        size,
        _integer(launcher, environ, "LOCAL_RANK"),
        local_size,
        environ.get("MASTER_ADDR"),
        _master_port(launcher, environ, None),
    )


def _from_openmpi(environ: Mapping[str, str]) -> Place:
    def value(name: str) -> int:
        return _integer("openmpi", environ, f"OMPI_COMM_WORLD_{name}")

    rank, size, local_size = value("RANK"), value("SIZE"), value("LOCAL_SIZE")
    _check("openmpi", environ, "RANK", "OMPI_COMM_WORLD_RANK", rank)
    _check("openmpi", environ, "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", size)
    address = environ.get("MASTER_ADDR")
    if address is None:
        address = "127.0.0.1" if local_size == size else _mpirun_address(environ, rank)
    job = environ.get("OMPI_MCA_ess_base_jobid") or environ.get("PMIX_NAMESPACE", "")
    port = _master_port("openmpi", environ, job if size > 1 else None)
    return Place("openmpi", rank, size, value("LOCAL_RANK"), local_size, address, port)


def _mpirun_address(environ: Mapping[str, str], rank: int) -> str:
    """Returns the address of ``mpirun``'s node, which Open MPI 4 gives to all ranks. Rank 0 runs
    there unless the hosts are ordered otherwise: then rank 0 raises, and ``mpirun`` ends the other
    ranks."""
    # JOB.PROCESS;tcp://ADDRESS,ADDRESS:PORT;...
    found = re.search(r"tcp://([^:;]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    addresses = found[1].split(",") if found else []
    address = next((each for each in addresses if not each.startswith("127.")), None)
    if address is None or (rank == 0 and not _is_own_address(address)):
        raise ValueError(
            "`MASTER_ADDR` must be the address of the node of rank 0 when Open MPI starts ranks on "
            "several nodes, but is missing, and Open MPI does not provide it. Start them by "
            "`mpirun -x MASTER_ADDR=...`, or write it to `.deepspeed_env` for "
            "`deepspeed --launcher openmpi`."
        )
    return address


def _is_own_address(address: str) -> bool:
    with socket.socket() as s:
        try:
            s.bind((address, 0))
        except OSError:
            return False
    return True


def _is_in_shell(environ: Mapping[str, str]) -> bool:
    """Returns whether this process is no task itself, but a rank started by the only task of a
    step, as in the shell of ``srun --pty`` or ``salloc``."""
    is_alone = environ.get("SLURM_STEP_NUM_TASKS") == "1"
    return is_alone and "RANK" in environ and environ.get("WORLD_SIZE", "1") != "1"


def _from_slurm(environ: Mapping[str, str]) -> Place:
    rank = _integer("slurm", environ, "SLURM_PROCID")
    size = _integer("slurm", environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    _check("slurm", environ, "RANK", "SLURM_PROCID", rank)
    _check("slurm", environ, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", size)
    node = _integer("slurm", environ, "SLURM_NODEID", default=0)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    local_size = size if tasks is None else _tasks_of_node(tasks, node)
    nodes = next(
        (environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST") if name in environ),
        None,
    )
    address = environ.get("MASTER_ADDR")
    if address is None:
        if nodes is None:
            raise ValueError(
                "`SLURM_NODELIST` must be set in a task of Slurm, but is missing. Set "
                "`MASTER_ADDR` to the node of rank 0."
            )
        address = "127.0.0.1" if local_size == size else first_host(nodes)
    job = f"{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}"
    port = _master_port("slurm", environ, job if size > 1 else None)
    local_rank = _integer("slurm", environ, "SLURM_LOCALID")
    return Place("slurm", rank, size, local_rank, local_size, address, port)


def first_host(nodes: str) -> str:
    """Returns the first host of a node list of Slurm.

    >>> first_host("rack[02-03]n[7,9-12],login")
    'rack02n7'

    :raises ValueError: the list is empty, or brackets do not match.
    """
    found = re.match(r"(?:[^\[\],]|\[[^\[\]]+\])+", nodes)
    if found is None:
        raise ValueError(
            f"A node list of Slurm must look like 'node[01-04],login', but is {nodes!r} instead."
        )
    return re.sub(r"\[([^\[\],-]+)[^\[\]]*\]", r"\1", found[0])


def _tasks_of_node(text: str, node: int) -> int:
    """Returns the number of tasks on a node from Slurm's list: ``2(x3),1`` is 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    if not 0 <= node < len(counts):
        raise ValueError(
            f"`SLURM_NODEID` must be one of the {len(counts)} nodes that "
            f"`SLURM_STEP_TASKS_PER_NODE` ({text}) counts, but is {node} instead."
        )
    return counts[node]


def _check(launcher: str, environ: Mapping[str, str], variable: str, name: str, value: int) -> None:
    """Checks that ``variable``, if set, agrees with the launcher's ``name``."""
    if environ.get(variable, str(value)) != str(value):
        raise ValueError(
            f"`{variable}` must be {value} or missing (`{name}` of {_TITLES[launcher]}), but is "
            f"{environ[variable]!r} instead. Unset the variables of another run: `RANK`, "
            "`WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`."
        )


def _master_port(launcher: str, environ: Mapping[str, str], job: str | None) -> int | None:
    """Returns ``MASTER_PORT``, or a port derived from the job, so that jobs on one node differ. It
    is below the ephemeral range."""
    if "MASTER_PORT" in environ:
        return _integer(launcher, environ, "MASTER_PORT")
    return None if job is None else 20_000 + zlib.crc32(job.encode()) % 10_000


def _integer(
    launcher: str, environ: Mapping[str, str], *names: str, default: int | None = None
) -> int:
    """Returns the first variable of ``names`` that is set."""
    for name in names:
        if name in environ:
            try:
                return int(environ[name])
            except ValueError:
                raise ValueError(
                    f"`{name}` must be an integer, but is {environ[name]!r} instead."
                ) from None
    if default is not None:
        return default
    raise ValueError(
        f"`{names[0]}` must be set in a process of {_TITLES[launcher]}, but is missing. Start the "
        "program by its launcher, or set it in the environment."
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


_TITLES = {
    "deepspeed": "`deepspeed`",
    "torchrun": "`torchrun`",
    "openmpi": "Open MPI",
    "slurm": "Slurm",
    "none": "a run with `RANK`",
}
