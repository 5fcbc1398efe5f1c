"""The place of a process from the variables of each launcher. `test_launch_examples.py` checks the
variables with the launchers themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tp_embed.launch.environment import Place, find_place, first_host

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "3312058369",
    "OMPI_MCA_orte_hnp_uri": "3312058368.0;tcp://127.0.0.1,10.0.0.1:55555;ud://1.2.3",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)",
    "SLURM_NODELIST": "login,gpu[003-005,9]",
    "SLURM_STEP_NODELIST": "gpu[003-005,9]",
}


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [
        ("deepspeed", {"CROSS_RANK": "1", "CROSS_SIZE": "3", "LOCAL_SIZE": "2"}),
        ("torchrun", {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}),
        # A launcher of a node, started by a launcher of nodes.
        ("deepspeed", {**SLURM, "SLURM_PROCID": "1", "CROSS_RANK": "1", "LOCAL_SIZE": "2"}),
        ("torchrun", {**OPENMPI, "TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "2"}),
        ("none", {"LOCAL_SIZE": "2"}),
    ],
)
def test_launchers_of_a_node(launcher, environ):
    expected = Place(launcher, 3, 6, 1, 2, "10.0.0.1", 29500)
    assert find_place({**environ, **TORCH}) == expected


def test_open_mpi():
    place = find_place(OPENMPI)
    assert (place.launcher, place.rank, place.size) == ("openmpi", 3, 6)
    assert (place.local_rank, place.local_size, place.master_addr) == (1, 2, "10.0.0.1")
    given = {**OPENMPI, "MASTER_ADDR": "node-a", "MASTER_PORT": "1234"}
    assert (find_place(given).master_addr, find_place(given).master_port) == ("node-a", 1234)
    on_one_node = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "6", "OMPI_MCA_orte_hnp_uri": ""}
    assert find_place(on_one_node).master_addr == "127.0.0.1"


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_MCA_orte_hnp_uri": ""},
        {"OMPI_MCA_orte_hnp_uri": "1;tcp://127.0.0.1:55555"},
        # Rank 0 is not on mpirun's node. 192.0.2.0/24 is reserved for documentation.
        {
            "OMPI_COMM_WORLD_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_MCA_orte_hnp_uri": "1;tcp://192.0.2.7:55555",
        },
    ],
)
def test_open_mpi_needs_the_address_of_rank_0(environ):
    with pytest.raises(ValueError, match=r"`MASTER_ADDR` must be .* `mpirun -x MASTER_ADDR=...`"):
        find_place({**OPENMPI, **environ})


def test_slurm():
    place = find_place(SLURM)
    assert (place.launcher, place.rank, place.size) == ("slurm", 3, 6)
    assert (place.local_rank, place.local_size, place.master_addr) == (1, 2, "gpu003")
    last = {**SLURM, "SLURM_PROCID": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
    assert find_place(last).local_size == 1
    assert find_place(last).master_port == place.master_port
    assert 20_000 <= place.master_port < 30_000
    assert find_place({**SLURM, "SLURM_JOB_ID": "78"}).master_port != place.master_port


def test_rank_that_a_shell_of_slurm_has_started_is_no_task():
    """As in `srun --pty bash`."""
    shell = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    shell |= {"SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert find_place({**shell, **TORCH}).launcher == "none"
    assert find_place({**shell, **TORCH}).rank == 3
    alone = find_place(shell)
    # Two programs of one shell must use different ports.
    assert (alone.launcher, alone.size, alone.master_port) == ("slurm", 1, None)
    environ = dict(shell)
    alone.export(environ)
    assert find_place(environ).launcher == "slurm"


def test_ranks_of_a_node_that_nobody_counts_are_not_guessed():
    """DeepSpeed assumes shared memory if `LOCAL_SIZE` equals `WORLD_SIZE`."""
    environ = dict(TORCH)
    place = find_place(environ)
    assert place.local_size is None
    place.export(environ)
    assert environ == TORCH


def test_batch_script_of_slurm_is_no_task():
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find_place(batch).size == 1


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("login", "login"),
        ("a1.example.org,b2", "a1.example.org"),
        ("node[001-128]", "node001"),
        ("node-[7,9-12],a", "node-7"),
        ("rack[02-03]n[7,9-12]-ib,login", "rack02n7-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes, expected):
    assert first_host(nodes) == expected


@pytest.mark.parametrize("nodes", ["", "[", "]a"])
def test_node_list_that_is_none_is_refused(nodes):
    with pytest.raises(ValueError, match="node list of Slurm must look like"):
        first_host(nodes)


def test_process_without_a_launcher_is_alone():
    place = find_place({"PATH": "/bin"})
    assert place == Place("none", 0, 1, 0, 1, "127.0.0.1", None)
    environ: dict[str, str] = {}
    place.export(environ)
    assert environ["RANK"] == "0"
    assert environ["WORLD_SIZE"] == "1"
    assert 0 < int(environ["MASTER_PORT"]) < 65536


@pytest.mark.parametrize("started", [OPENMPI, SLURM])
def test_export_sets_what_is_missing_and_changes_nothing_else(started):
    environ = {**started, "MASTER_PORT": "1111"}
    place = find_place(environ)
    place.export(environ)
    assert {name: environ[name] for name in TORCH} == {
        **TORCH,
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": "1111",
    }
    assert environ["LOCAL_SIZE"] == environ["LOCAL_WORLD_SIZE"] == "2"
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**SLURM, "RANK": "0"}, "`RANK` must be 3 or missing .`SLURM_PROCID` of Slurm."),
        ({**SLURM, "WORLD_SIZE": "2"}, "`WORLD_SIZE` must be 6 or missing .`SLURM_STEP_NUM_TASKS`"),
        ({**SLURM, "SLURM_NODEID": "4"}, "`SLURM_NODEID` must be one of the 4 nodes .* is 4"),
        ({**OPENMPI, "WORLD_SIZE": "8"}, "`WORLD_SIZE` must be 6 .* of Open MPI., but is '8'"),
        ({**OPENMPI, "RANK": "0"}, "`RANK` must be 3 .* of Open MPI., but is '0' instead"),
        ({**TORCH, "RANK": "three"}, "`RANK` must be an integer, but is 'three' instead"),
        ({"RANK": "0"}, "`WORLD_SIZE` must be set in a process of a run with `RANK`"),
        ({**TORCH, "WORLD_SIZE": "2"}, "The rank that a run with `RANK` gives must fit"),
        ({**SLURM, "SLURM_LOCALID": "2"}, "The local rank that Slurm gives must fit"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "`SLURM_STEP_NUM_TASKS` must be set"),
    ],
)  # fmt: skip
def test_variables_that_do_not_fit_are_named(environ, message):
    with pytest.raises(ValueError, match=message):
        find_place(environ)


def test_torch_is_not_imported(tmp_path):
    script = "import sys, tp_embed.launch.environment; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
