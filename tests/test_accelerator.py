"""Nothing waits for an accelerator unless rows are counted, so graphs can be captured.

On ``meta``, which every machine has, reading a value raises. With a GPU, CUDA reports where the
host waited.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from parity import SHARDED
from tp_embed import BatchLayout, FakeGang, ProcessGroupGang, ReduceOperation, StandardEmbedding
from tp_embed.lookup.ids import IdCheck

V, E = 29, 7
DEVICES = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]

CASES = [
    ("standard", {}),
    ("standard", {"pad_idx": 3, "scale": 2.0}),
    *(
        (kind, {"output": output, "dedup": dedup})
        for kind in sorted(SHARDED)
        for output in ("replicated", "sequence")
        for dedup in ("auto", False)
    ),
    ("embed", {"output": "shard", "pad_idx": 3}),
    ("vocab", {"output": "sequence", "pad_idx": 3, "scale": torch.tensor(0.5)}),
    ("embed", {"reuse_grad": True}),
]


def build(kind, device, rank=1, size=3, **options):
    if kind == "standard":
        return StandardEmbedding(V, E, device=device, **options)
    return SHARDED[kind](FakeGang(device, rank=rank, size=size), V, E, device=device, **options)


class NothingFromTheHost(TorchFunctionMode):
    """Refuses copies of values from the host's pageable memory, which wait."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), func
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            assert not isinstance(args[1], list), "a list as an index"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_cpu:
            assert not any(isinstance(a, torch.Tensor) and a.is_cpu and a.ndim for a in args), func
        return result


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    if device == "meta":
        with NothingFromTheHost():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# CUDA uses another gradient kernel above 3072 ids.
@pytest.mark.parametrize("shape", [(2, 5), (3, 2048)], ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_waits(device, kind, options, shape):
    embed = build(kind, device, **options)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    layout = BatchLayout.of(ids)  # Without padding.
    for _ in range(4):  # The check of ids reads its results two calls later.
        with no_waiting(device):
            output = embed(ids, layout)
            output.backward(torch.ones_like(output))
    assert embed.weight.grad.shape == embed.weight.shape


def agree_with_the_cpu(device, kind, options):
    """With any ids, including padding. A FakeGang's collectives repeat this rank's values, so
    results compare only if both devices call the same collectives."""
    embed = build(kind, device, **options)
    if kind != "standard" and options.get("dedup", "auto") == "auto":
        options = {**options, "dedup": False}
    expected = build(kind, "cpu", **options)
    with torch.no_grad():
        expected.weight.copy_(embed.weight)
    for shape in [(3, 5), (3, 2048)]:
        ids = torch.randint(V, shape)
        for layout in (None, BatchLayout.of(ids, [shape[1], 1, 2])):
            output, wanted = embed(ids.to(device), layout), expected(ids, layout)
            assert torch.equal(output.cpu(), wanted)
            if (kind, options.get("output")) == ("vocab", "sequence"):
                continue  # Only the CPU finds out where to send which gradients.
            grad = torch.randn_like(wanted)
            output.backward(grad.to(device))
            wanted.backward(grad)
            found = embed.weight.grad.cpu()
            torch.testing.assert_close(found, expected.weight.grad, rtol=1e-5, atol=1e-4)
            embed.weight.grad = expected.weight.grad = None


@pytest.mark.parametrize("device", DEVICES)
def test_waiting_is_noticed(device):
    ids = torch.zeros((2, 5), dtype=torch.int64, device=device)
    for kind in sorted(SHARDED):
        embed = build(kind, device, dedup=True)
        with pytest.raises(RuntimeError), no_waiting(device):
            embed(ids)
    if device == "meta":
        for wait in (lambda: ids.new_tensor([1]), lambda: torch.tensor([1]).to(device)):
            with pytest.raises(AssertionError), no_waiting(device):
                wait()


if torch.cuda.is_available():

    @pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
    def test_accelerator_agrees_with_the_cpu(kind, options):
        agree_with_the_cpu("cuda", kind, options)

    def test_ids_out_of_range_are_errors_two_calls_later():
        embed = build("embed", "cuda")
        embed(torch.tensor([V], device="cuda"))
        embed(torch.tensor([0], device="cuda"))
        with pytest.raises(IndexError, match=rf"position \(0,\) is {V} instead"):
            embed(torch.tensor([0], device="cuda"))
        embed.check_ids()

    @pytest.mark.parametrize("shape", [(2, 5), (3, 2048)], ids=str)
    @pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
    def test_capture(kind, options, shape):
        embed = build(kind, "cuda", **options)
        ids = torch.randint(V, shape, device="cuda")

        def step() -> torch.Tensor:
            embed.weight.grad = None
            output = embed(ids)
            output.square().sum().backward()
            return output

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
        grad = embed.weight.grad
        for _ in range(2):
            ids.copy_(torch.randint(V, shape, device="cuda"))
            graph.replay()
            found = output.clone(), grad.clone()
            torch.testing.assert_close(found[0], step())
            torch.testing.assert_close(found[1], embed.weight.grad)

    def test_collectives_of_nccl_do_not_wait(tmp_path):
        torch.cuda.set_device(0)
        dist.init_process_group(
            "nccl",
            init_method=f"file://{tmp_path}/store",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
        )
        try:
            gang = ProcessGroupGang(None, "cuda")
            x = torch.arange(6.0, device="cuda").view(2, 3)
            output = torch.empty_like(x)
            for again in range(2):  # NCCL connects the first time, and may wait.
                with no_waiting("cuda") if again else torch.no_grad():
                    gang.all_gather(output, x, [2])
                    gang.all_gather(output[None], x)
                    gang.all_to_all(output, x, [2], [2])
                    gang.reduce_scatter(output, x[None])
                    gang.all_reduce(output, ReduceOperation.SUM)
            assert torch.equal(output, x)
        finally:
            dist.destroy_process_group()


def test_ids_are_not_checked_where_there_are_no_values():
    check = IdCheck()
    check(torch.empty(3, dtype=torch.int64, device="meta"), 2, "here")
    check.flush()
