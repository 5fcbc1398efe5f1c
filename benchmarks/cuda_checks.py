"""Checks for CUDA only: streams, graphs, compiled code, NCCL. `accelerator_checks.py` has the
checks for all devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from accelerator_checks import E, V, block, expected_gradient, on, tables
from tp_embed import ProcessGroupGang, ReduceOperation, ShardedEmbedding
from tp_embed.monitor import Traffic

# Device clock cycles, enough for the host to run ahead of the device.
_CYCLES = 20_000_000


@on("cuda")
def nothing_waits(device: str) -> None:
    for count in (10, 6144):
        ids = torch.randint(V, (count,), device=device)
        for embed in tables(device):
            for step in range(4):  # NCCL and cuBLAS may wait the first time.
                embed.zero_grad()
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                try:
                    output = embed(ids)
                    output.backward(torch.ones_like(output))
                finally:
                    torch.cuda.set_sync_debug_mode("default")


@on("cuda")
def a_graph_replays_a_lookup(device: str) -> None:
    for count in (10, 6144):
        for embed in tables(device, pad_idx=3):
            ids = torch.randint(V, (count,), device=device)
            replay, gradient = captured(embed, ids)
            for _ in range(2):
                new = torch.randint(V, (count,))
                ids.copy_(new)
                replay()
                wanted = block(embed, expected_gradient(new, torch.ones(count, E), V, 3))
                torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-5, atol=1e-4)


def captured(embed: torch.nn.Module, ids: Tensor) -> tuple[Callable[[], object], Tensor]:
    """Captures a step. Returns its graph, and the gradient that it writes."""
    parameter = next(embed.parameters())

    def step() -> None:
        embed.zero_grad()
        output = embed(ids)
        output.backward(torch.ones_like(output))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert parameter.grad is not None
    return graph.replay, parameter.grad


@on("cuda")
def other_streams_give_the_same(device: str) -> None:
    """Keeps the device busy, so that code that does not wait for a stream reads too early."""
    for embed in tables(device):
        ids, grad = torch.randint(V, (6144,)), torch.randn(6144, E)
        side = torch.cuda.Stream()
        on_device, given = ids.to(device), grad.to(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(_CYCLES)
            output = embed(on_device)
        torch.cuda.current_stream().wait_stream(side)
        output.backward(given)
        assert embed.weight.grad is not None
        wanted = block(embed, expected_gradient(ids, grad, V, None))
        torch.testing.assert_close(embed.weight.grad.cpu().double(), wanted, rtol=1e-5, atol=1e-4)
        seen = "no error"
        try:
            with torch.cuda.stream(side):
                for late in (V, 0, 0):
                    torch.cuda._sleep(_CYCLES)
                    embed(torch.full((2,), late, device=device))
        except IndexError as e:
            seen = str(e)
        assert "position (0,) is 29" in seen, f"{embed}: {seen}"


@on("cuda")
def reused_gradients_wait_for_other_streams(device: str) -> None:
    """Reads a gradient late on another stream, like an all-reduce that overlaps the next step."""
    for embed in tables(device, reuse_grad=True, dedup=True):
        side, read = torch.cuda.Stream(), []
        for step in range(4):
            embed.zero_grad()
            embed(torch.arange(step, step + 9, device=device)).sum().backward()
            gradient = embed.weight.grad
            assert gradient is not None
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(_CYCLES)
                read.append((gradient.clone(), step))
            gradient.record_stream(side)
            del gradient
        torch.cuda.synchronize()
        for gradient, step in read:
            ids = torch.arange(step, step + 9)
            wanted = block(embed, expected_gradient(ids, torch.ones(9, E), V, None))
            assert torch.equal(gradient.cpu().double(), wanted), f"{embed}, step {step}"


@on("cpu", "cuda")
def compiled_lookups_are_those_of_torch(device: str) -> None:
    """Uses inductor and CUDA graphs on a GPU; elsewhere generates no code."""
    is_cuda = torch.device(device).type == "cuda"
    modes = ["default", "reduce-overhead"] if is_cuda else [None]
    for mode in modes:
        for embed in tables(device, sizes=(2,)):
            torch.compiler.reset()
            if mode is None:
                compiled = torch.compile(embed, backend="aot_eager", fullgraph=True)
            else:
                compiled = torch.compile(embed, mode=mode, fullgraph=True)
            for _ in range(3):
                ids, grad = torch.randint(V, (40,)), torch.randn(40, E)
                embed.zero_grad()
                compiled(ids.to(device)).backward(grad.to(device))
                wanted = block(embed, expected_gradient(ids, grad, V, None))
                found = embed.weight.grad
                assert found is not None
                torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-4)


@on("cuda")
def nccl_takes_empty_and_uneven_pieces(device: str) -> None:
    """Runs on one rank: a machine with one GPU has no other."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
        )
        try:
            gang = ProcessGroupGang(None, device)
            for rows in (2, 0):
                x = torch.arange(3.0 * rows, device=device).view(rows, 3)
                output = torch.full_like(x, 7)
                gang.all_gather(output, x, [rows])
                gang.all_gather(output[None], x)
                gang.all_to_all(output, x, [rows], [rows])
                gang.reduce_scatter(output, x[None])
                gang.all_reduce(output, ReduceOperation.SUM)
                gang.broadcast(output)
                assert torch.equal(output, x)
            with Traffic(gang) as traffic, torch.cuda.graph(torch.cuda.CUDAGraph()):
                gang.all_reduce(output)  # Counted, but no event is queried during capture.
            assert traffic.total().calls == 1
            embed = ShardedEmbedding(gang, V, E, device=device)
            embed(torch.arange(9, device=device)).sum().backward()
            torch.cuda.synchronize()
        finally:
            dist.destroy_process_group()


@on("cpu", "cuda")
def two_ranks_agree_with_torch(device: str) -> None:
    """Runs on one device, over gloo: NCCL refuses two ranks on one GPU."""
    here = Path(__file__).parent
    code = (
        "import sys, json, pathlib, accelerator_ranks as r; rank, device, store = sys.argv[1:]; "
        "print(json.dumps(r.run(int(rank), 2, device, pathlib.Path(store))))"
    )
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), device, f"{folder}/store"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for rank, job in enumerate(jobs):
            output, error = job.communicate(timeout=150)
            assert job.returncode == 0, f"rank {rank}: {error[-2000:]}"
            wrong = json.loads(output.splitlines()[-1])
            assert not wrong, f"rank {rank}: {wrong[:5]}"
