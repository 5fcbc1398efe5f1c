from __future__ import annotations

import copy
import pickle
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch

from tp_embed import FakeGang, GangError, ProcessGroupGang, ReduceOperation


def collectives(gang):
    rank, size = gang.rank, gang.size
    own = torch.arange(6.0).view(2, 3) + 100 * rank
    of_rank = [torch.arange(6.0).view(2, 3) + 100 * r for r in range(size)]

    for operation, expected in [
        (ReduceOperation.SUM, sum(of_rank)),
        (ReduceOperation.MIN, of_rank[0]),
        (ReduceOperation.MAX, of_rank[-1]),
    ]:
        tensor = own.clone()
        gang.all_reduce(tensor, operation)
        assert torch.equal(tensor, expected)

    output = torch.empty(size, 2, 3)
    gang.all_gather(output, own)
    assert torch.equal(output, torch.stack(of_rank))
    # A transposed input is gathered by its values, not by its memory.
    output = torch.empty(size, 3, 2)
    gang.all_gather(output, own.t())
    assert torch.equal(output, torch.stack([t.t() for t in of_rank]))

    # Each rank has a different number of rows; gloo uses other algorithms for large inputs.
    for width in (1, 20_000):
        parts = [torch.full((r + 1, width), float(r)) for r in range(size)]
        output = torch.empty(sum(range(1, size + 1)), width)
        sizes = [len(part) for part in parts]
        gang.all_gather(output, parts[rank], sizes)
        assert torch.equal(output, torch.cat(parts))
        # The input is in its place in the output.
        output = torch.zeros(size, 2, width)
        output[rank] = rank
        gang.all_gather(output, output[rank])
        assert torch.equal(output, torch.arange(float(size))[:, None, None].expand_as(output))

    output = torch.empty(2, 3)
    gang.reduce_scatter(output, torch.stack([own + 1000 * r for r in range(size)]))
    assert torch.equal(output, sum(of_rank) + size * 1000 * rank)

    # Rank s sends r + 1 items to rank r.
    sizes = [r + 1 for r in range(size)]
    sent = torch.cat([torch.full((r + 1,), float(10 * rank + r)) for r in range(size)])
    output = torch.empty((rank + 1) * size)
    gang.all_to_all(output, sent, [rank + 1] * size, sizes)
    expected = torch.cat([torch.full((rank + 1,), float(10 * s + rank)) for s in range(size)])
    assert torch.equal(output, expected)

    for source in range(size):
        tensor = own.clone()
        gang.broadcast(tensor, source)
        assert torch.equal(tensor, of_rank[source])
        objects = [{"rank": rank}, rank]
        gang.broadcast_objects(objects, source)
        assert objects == [{"rank": source}, source]
    gang.barrier()
    return rank, gang.global_ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives(pool, size):
    results = pool(size, collectives)
    assert [rank for rank, _ in results] == list(range(size))
    # Ranks in the gang differ from global ranks.
    assert all(ranks == list(range(4 - size, 4)) for _, ranks in results)


def views(gang):
    """Collectives of views that are not contiguous change their items and no others."""
    for view in (lambda x: x.t(), lambda x: x[:, 1:3], lambda x: x[::2], lambda x: x[:, 0]):
        whole = torch.arange(12.0).view(3, 4) * (gang.rank + 1)
        rest, factor = whole.clone(), sum(range(1, gang.size + 1))
        expected = torch.arange(12.0).view(3, 4) * factor
        gang.all_reduce(view(whole))
        view(rest).copy_(view(expected))
        assert torch.equal(whole, rest)
        gang.broadcast(view(whole.mul_(gang.rank + 1)), gang.size - 1)
        rest.mul_(gang.rank + 1)
        view(rest).copy_(view(expected) * gang.size)
        assert torch.equal(whole, rest)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives_of_views(pool, size):
    pool(size, views)


def subgangs(gang):
    outer = gang.create_gang([3, 1])
    assert (outer is None) == (gang.rank not in (1, 3))
    if outer is None:
        return None
    inner = outer.create_gang([1])
    tensor = torch.tensor([float(gang.rank)])
    outer.broadcast(tensor, source_rank=1)
    assert outer.timeout == gang.timeout
    return outer.rank, outer.global_ranks, tensor.item(), inner and inner.global_ranks


def test_gang_of_a_gang_has_its_own_ranks(pool):
    assert pool(4, subgangs) == [None, (0, [1, 3], 3.0, None), None, (1, [1, 3], 3.0, [3])]


def reduce_with_a_missing_rank(gang):
    quick = gang.create_gang(range(gang.size), timeout=timedelta(seconds=2))
    quick.barrier()
    if gang.rank == 1:
        time.sleep(4)
        return "absent"
    started = time.monotonic()
    try:
        quick.all_reduce(torch.zeros(7, 5, dtype=torch.bfloat16))
    except GangError as e:
        return str(e), time.monotonic() - started
    return "no error"


def test_time_out_is_an_error_that_says_what_where_and_who(pool):
    failed, absent = pool(2, reduce_with_a_missing_rank)
    pool.stop()  # The connections of the gang are broken now.
    assert absent == "absent"
    message, seconds = failed
    assert seconds < 10
    for part in (
        "`all_reduce` of (7, 5) torch.bfloat16 failed on rank 0",
        "ProcessGroupGang(rank=0, size=2, device='cpu', global_ranks=[2, 3])",
        "timeout 0:00:02",
    ):
        assert part in message


def pickled_and_copied(gang):
    assert copy.deepcopy(gang) is gang
    again = pickle.loads(pickle.dumps(gang))
    tensor = torch.ones(1)
    again.all_reduce(tensor)
    return again.rank, tensor.item(), pickle.dumps(gang)


def test_pickled_gang_finds_its_group_again(pool):
    results = pool(3, pickled_and_copied)
    assert [r[:2] for r in results] == [(0, 3.0), (1, 3.0), (2, 3.0)]

    # This process has no such group.
    detached = pickle.loads(results[1][2])
    assert (detached.rank, detached.size) == (1, 3)
    with pytest.raises(GangError, match=r"not rank 1 of a process group .*\[1, 2, 3\]"):
        detached.all_reduce(torch.ones(1))


def test_fake_gang_repeats_what_it_has():
    gang = FakeGang("cpu", rank=1, size=3)
    tensor = torch.tensor([1.0, 2.0])
    gang.all_reduce(tensor)
    assert tensor.tolist() == [3.0, 6.0]
    gang.all_reduce(tensor, ReduceOperation.MAX)
    assert tensor.tolist() == [3.0, 6.0]

    output = torch.empty(3, 2)
    gang.all_gather(output, tensor)
    assert output.tolist() == [[3.0, 6.0]] * 3
    output = torch.empty(2)
    gang.reduce_scatter(output, torch.arange(6.0).view(3, 2))
    assert output.tolist() == [6.0, 9.0]
    output = torch.empty(6)
    gang.all_to_all(output, torch.arange(6.0), [2, 2, 2], [1, 2, 3])
    assert output.tolist() == [1.0, 2.0] * 3
    output = torch.empty(6)
    gang.all_gather(output, tensor, [1, 2, 3])
    assert output.tolist() == [3.0, 3.0, 6.0, 3.0, 6.0, 0.0]

    child = gang.create_gang([1, 2])
    assert (child.rank, child.size) == (0, 2)
    assert gang.create_gang([0, 2]) is None


def hooked(gang):
    seen = []

    @contextmanager
    def hook(operation, tensors):
        seen.append([operation, [(tuple(t.shape), t.dtype) for t in tensors]])
        yield
        seen[-1].append("done")

    handle = gang.register_collective_hook(hook)
    output = torch.empty(gang.size, 3)
    with torch.profiler.profile() as profile:
        gang.all_gather(output, torch.ones(3))
    gang.broadcast_objects([1])
    with pytest.raises(ValueError, match="source_rank"):
        gang.broadcast(output, 9)
    handle.remove()
    gang.barrier()
    assert seen == [
        ["all_gather", [((3,), torch.float32)], "done"],
        ["broadcast_objects", [], "done"],
    ]
    assert [e.count for e in profile.key_averages() if e.key == "tp_embed.all_gather"] == [1]


def test_hooks_see_each_collective_until_they_are_removed(pool):
    pool(2, hooked)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: FakeGang("cpu", rank=2, size=2), r"`rank` must be in \[0, 2\)"),
        (lambda g: FakeGang("cpu", size=0), "`size` must be greater than or equal to 1"),
        (lambda g: g.create_gang([]), r"at least one, but is \[\]"),
        (lambda g: g.create_gang([0, 3]), r"in \[0, 3\), .* but is \[0, 3\]"),
        (lambda g: g.create_gang([1, 1]), r"distinct ranks"),
        (lambda g: g.broadcast(torch.ones(1), 3), r"`source_rank` must be in \[0, 3\)"),
        (lambda g: g.broadcast_objects([1], -1), r"`source_rank` must be in \[0, 3\)"),
        (
            lambda g: g.all_gather(torch.empty(2, 5), torch.empty(5)),
            r"`output` must have the shape \(3, 5\).* but has \(2, 5\)",
        ),
        (
            lambda g: g.all_gather(torch.empty(3, 5), torch.empty(5).half()),
            r"the dtype torch.float16 .*torch.float32 instead",
        ),
        (
            lambda g: g.all_to_all(torch.empty(4), torch.empty(4)),
            r"`output` must have a first dimension that is divisible by .*\(3\), but it is 4",
        ),
        (
            lambda g: g.all_to_all(torch.empty(4), torch.empty(4), [4, 0], [4, 0, 0]),
            r"`output_sizes` must be 3 sizes",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(FakeGang("cpu", rank=1, size=3))


def test_a_gang_needs_torch_distributed():
    with pytest.raises(GangError, match="must be initialised before"):
        ProcessGroupGang(None, "cpu")
    with pytest.raises(GangError, match="has no process group"):
        FakeGang("cpu").as_process_group()
