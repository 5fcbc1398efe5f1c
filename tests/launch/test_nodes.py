"""Several nodes, by common launchers: each starts the same job over two or three hosts, with the
same losses as on one host and in one process of plain torch."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

import engines_job
import llama
import node_job
from hosts import IFNAME, hosts, require
from launch import BIN, environment, free_port

JOB_SECONDS = 240
# Variables that processes need on every node; ssh passes none.
NEEDED = ["DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH", "PYTHONPATH", "TORCH_EXTENSIONS_DIR"]
LAUNCHERS = ["pdsh", "torchrun", "mpirun"]


@pytest.fixture(scope="module")
def nodes():
    require("mpirun", "pdsh")
    with hosts(3, loopback_names=True) as started:
        yield started


class Runs:
    """Runs the job once per key, in a directory that all nodes share."""

    def __init__(self, nodes, directory):
        self.nodes, self.directory = nodes, directory
        self.checkpoint = directory / "checkpoint"
        self.own = nodes[0].local / "checkpoint"  # On each node's own disk.
        self.env = {name: environment()[name] for name in NEEDED} | {"GLOO_SOCKET_IFNAME": IFNAME}
        lines = [f"{name}={value}\n" for name, value in self.env.items()]
        (directory / ".deepspeed_env").write_text("".join(lines))
        for count, slots in ((2, 2), (3, 1)):
            lines = [f"{node.name} slots={slots}\n" for node in nodes[:count]]
            (directory / f"hostfile{count}").write_text("".join(lines))

    def __getitem__(self, launcher):
        """Returns the results by rank."""
        out = self.directory / launcher
        if not out.exists():
            out.mkdir()
            getattr(self, f"_{launcher}")([node_job.__file__, out])
        files = sorted(out.iterdir())
        assert files, f"the run by {launcher} has failed before"
        return [json.loads(file.read_text()) for file in files]

    def _run(self, command):
        self.nodes[0].run(command, JOB_SECONDS, self.directory, self.env)

    def _pdsh(self, job):
        options = ["--hostfile=hostfile2", f"--master_port={free_port()}", "--no_local_rank"]
        self._run([BIN / "deepspeed", *options, *job, "save", self.checkpoint])

    def _torchrun(self, job):
        options = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=job"]
        options += [f"--rdzv-endpoint={self.nodes[0].name}:{free_port()}"]
        command = [BIN / "torchrun", *options, *job, "save", self.own]
        jobs = [node.start(command, self.directory, self.env) for node in self.nodes[:2]]
        statuses = [job.wait(JOB_SECONDS) for job in jobs]
        assert statuses == [0, 0], "\n".join(job.output for job in jobs)

    def _mpirun(self, job):
        where = ",".join(f"{node.name}:2" for node in self.nodes[:2])
        options = ["--allow-run-as-root", "--host", where, "--mca", "btl_tcp_if_include", IFNAME]
        for name in self.env:
            options += ["-x", name]
        self._run(["mpirun", *options, sys.executable, *job, "save"])

    def _deepspeed_openmpi(self, job):
        options = ["--hostfile=hostfile3", "--launcher=openmpi"]
        options += ["--launcher_args=--allow-run-as-root"]
        self._run([BIN / "deepspeed", *options, *job, "save"])

    def _one_node(self, job):
        """Resumes a checkpoint of two nodes."""
        assert self["pdsh"]
        assert self["torchrun"]
        a, b = self.nodes[:2]
        a.run(["scp", "-rq", f"{b.name}:{self.own}", self.own.parent])
        options = ["--num_gpus=4", f"--master_port={free_port()}", "--no_local_rank"]
        self._run([BIN / "deepspeed", *options, *job, "resume", self.checkpoint, self.own])


@pytest.fixture(scope="module")
def runs(nodes, tmp_path_factory):
    return Runs(nodes, tmp_path_factory.mktemp("nodes"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_rank_knows_its_place(runs, launcher):
    name = {"pdsh": "deepspeed", "mpirun": "openmpi"}.get(launcher, launcher)
    for rank, seen in enumerate(runs[launcher]):
        place = seen["place"]
        assert seen["host"] == f"node{1 + rank // 2}"
        assert place["launcher"] == name
        assert (place["rank"], place["size"]) == (rank, 4)
        assert (place["local_rank"], place["local_size"]) == (rank % 2, 2)
        assert place["master_addr"] in (runs.nodes[0].name, runs.nodes[0].address)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_losses_are_those_of_one_node(runs, launcher):
    """Bit for bit: each sum has two terms, so the order does not matter."""
    for seen, expected in zip(runs[launcher], runs["one_node"], strict=True):
        assert expected["host"] == "node1"
        assert seen["inside"] == expected["inside"]
        assert seen["across"] == expected["across"]
        assert seen["gang"] == expected["gang"]


def train_alone(model, lr, batches, loss_of):
    """Returns the mean losses of the data-parallel ranks, in one process of plain torch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for step in zip(*batches, strict=True):
        optimizer.zero_grad()
        loss = torch.stack([loss_of(ids) for ids in step]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return pytest.approx(losses, rel=1e-5)


def train_small_alone(dp_size):
    model = engines_job.build()
    model.up.bias = model.down.bias = None  # Parallel layers have no bias.
    batches = [engines_job.batches(rank) for rank in range(dp_size)]
    return train_alone(model, engines_job.LR, batches, model)


def means(seen, what):
    """Averages over data-parallel ranks."""
    return [sum(losses) / len(seen) for losses in zip(*(s[what] for s in seen), strict=True)]


def test_tensor_parallelism_inside_nodes_is_as_plain_torch(runs):
    model = llama.build(tied=True)
    expected = train_alone(
        model,
        node_job.LR,
        [node_job.batches(rank) for rank in range(2)],
        lambda ids: model(input_ids=ids, labels=ids).loss,
    )
    assert means(runs["pdsh"], "inside") == expected


def test_tensor_parallelism_across_nodes_is_as_plain_torch(runs):
    assert means(runs["pdsh"], "across") == train_small_alone(dp_size=2)
    assert [seen["gang"] for seen in runs["pdsh"]] == [[0, 2], [1, 3]] * 2


def test_three_nodes_by_the_openmpi_launcher_of_deepspeed(runs):
    """Without mpi4py. A vocab of 23 is uneven over three ranks."""
    seen = runs["deepspeed_openmpi"]
    assert [s["host"] for s in seen] == ["node1", "node2", "node3"]
    assert all(s["gang"] == [0, 1, 2] for s in seen)
    assert seen[0]["across"] == seen[1]["across"] == seen[2]["across"]
    assert seen[0]["across"] == train_small_alone(dp_size=1)


@pytest.mark.parametrize("disk", ["of all nodes", "of each node"])
def test_checkpoint_of_two_nodes_resumes_on_one(runs, disk):
    """The losses are the same bit for bit. The files of both nodes' disks are joined first."""
    which = ["of all nodes", "of each node"].index(disk)
    for seen in runs["one_node"]:
        assert seen["resumed"][which] == seen["inside"][node_job.STEPS // 2 :]


SUM = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1)
dist.all_reduce(x)
print("sum", x.item())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("variable", [{}, {"GLOO_SOCKET_IFNAME": IFNAME}])
def test_gloo_needs_the_interface_where_a_host_takes_itself_for_loopback(nodes, variable):
    """Without it, a node tells the others to connect to 127.0.1.1."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(free_port())}
    jobs = [
        node.start([sys.executable, "-c", SUM], env={**place, **variable, "RANK": str(rank)})
        for rank, node in enumerate(nodes[:2])
    ]
    if variable:
        statuses = [job.wait(60) for job in jobs]
        outputs = [job.output for job in jobs]
        assert statuses == [0, 0], outputs
        assert all("sum 2.0" in output for output in outputs)
        return
    deadline = time.monotonic() + 60
    while all(job.status is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)
    outputs = [job.output for job in jobs if job.status is not None]
    for job in jobs:
        job.kill()  # The other rank, which waits for connections.
    assert any("Connection refused, remote=[127.0.1.1]" in output for output in outputs)
