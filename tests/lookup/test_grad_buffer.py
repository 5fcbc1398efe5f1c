"""Gradients in reused memory are the same bit for bit as in new memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from parity import SHARDED, assert_same_bits
from tp_embed import FakeGang, StandardEmbedding
from tp_embed.parameter.sharded import local

V, E, STEPS = 61, 6, 6


def table(kind, gang, reuse_grad, dtype=torch.float32):
    torch.manual_seed(0)
    whole = StandardEmbedding(V, E, pad_idx=3, reuse_grad=reuse_grad, dtype=dtype)
    return SHARDED[kind].from_embedding(whole, gang)


def backward(embed, step, micro=0, seed=0, weight=None):
    """Runs a backward of different ids in each step, with duplicates."""
    generator = torch.Generator().manual_seed(100 * seed + 10 * step + micro)
    ids = torch.randint(V, (3, 4), generator=generator)
    output = embed(ids)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))


def plain(embed, step):
    backward(embed, step)


def accumulated(embed, step):
    for micro in range(3):
        backward(embed, step, micro)


def clipped(embed, step):
    backward(embed, step)
    torch.nn.utils.clip_grad_norm_(embed.parameters(), 0.1, foreach=step % 2 == 0)


def written_to(embed, step):
    backward(embed, step)
    local(embed.weight.grad)[step] = 5.0


def written_to_by_a_view(embed, step):
    backward(embed, step)
    local(embed.weight.grad).view(-1)[step].add_(1.0)


def used_twice(embed, step):
    """Uses the table twice in one backward, where autograd sums two gradients."""
    generator = torch.Generator().manual_seed(step)
    first, second = torch.randint(V, (2, 5), generator=generator)
    (embed(first) * embed(second)).sum().backward()


def backward_again(embed, step):
    output = embed(torch.arange(step, step + 9))
    output.sum().backward(retain_graph=True)
    output.square().sum().backward()


def with_a_penalty(embed, step):
    """Adds a second, dense gradient of the weight."""
    backward(embed, step)
    (embed.weight.square().sum() * 0.01).backward()


def kept_by_autograd_grad(embed, step):
    output = embed(torch.arange(step, step + 9))
    (gradient,) = torch.autograd.grad(output.sum(), embed.weight)
    backward(embed, step)
    embed.weight.grad += gradient


WAYS = [
    plain,
    accumulated,
    clipped,
    written_to,
    written_to_by_a_view,
    used_twice,
    backward_again,
    with_a_penalty,
    kept_by_autograd_grad,
]


def train(gang, kind, way, reuse_grad, set_to_none, dtype):
    embed = table(kind, gang, reuse_grad, dtype)
    optimizer = torch.optim.AdamW(embed.parameters(), lr=0.1)
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        way(embed, step)
        gradients.append(embed.weight.grad.clone())
        optimizer.step()
    return [*gradients, embed.weight.detach()]


def train_both(gang, *args):
    kind, way, set_to_none, dtype = args
    return [train(gang, kind, way, reuse, set_to_none, dtype) for reuse in (False, True)]


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_new_memory(pool, way, set_to_none, kind):
    dtype = torch.bfloat16 if way is accumulated else torch.float32
    for expected, seen in pool(2, train_both, kind, way, set_to_none, dtype):
        for a, b in zip(seen, expected, strict=True):
            assert_same_bits(a, b, "gradients, and the table at the end")


def addresses(gang, keep):
    """Returns the addresses of each step's gradient, and the kept gradients at the end."""
    embed = table("embed", gang, reuse_grad=True)
    found, kept, copies = [], [], []
    for step in range(STEPS):
        embed.zero_grad()
        backward(embed, step)
        found.append(embed.weight.grad.data_ptr())
        if keep(step):
            kept.append(embed.weight.grad)
            copies.append(embed.weight.grad.clone())
    return found, all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def never(step):
    return False


def second(step):
    return step == 1


def test_memory_is_taken_again(pool):
    for found, _ in pool(2, addresses, never):
        assert len(set(found)) == 1


def test_gradient_that_is_kept_stays_as_it_is(pool):
    for found, unchanged in pool(2, addresses, second):
        assert unchanged
        assert found[0] == found[1]
        assert found[1] not in found[2:]
        assert len(set(found[2:])) == 1


def hooked(gang, reuse_grad):
    """Hooks the gradient before and after accumulation. The first hook replaces it, and all hooks
    see it."""
    embed = table("vocab", gang, reuse_grad)
    seen = []
    embed.weight.register_hook(lambda grad: seen.append(grad.clone()))
    embed.weight.register_hook(lambda grad: grad * 2)
    embed.weight.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad.clone()))

    def change(weight):
        weight.grad.mul_(0.5).add_(1)

    embed.weight.register_post_accumulate_grad_hook(change)
    for step in range(STEPS):
        if step % 2:
            embed.zero_grad()
        backward(embed, step)
        seen.append(embed.weight.grad.clone())
    return seen


def step_in_the_backward(gang, reuse_grad):
    """Steps an optimizer, and drops the gradient, as soon as it is accumulated."""
    embed = table("embed", gang, reuse_grad)
    optimizer = torch.optim.SGD(embed.parameters(), lr=0.1, momentum=0.9)

    def step_at_once(weight):
        optimizer.step()
        optimizer.zero_grad()

    embed.weight.register_post_accumulate_grad_hook(step_at_once)
    for step in range(STEPS):
        backward(embed, step)
    return [embed.weight.detach()]


def copied(gang, reuse_grad):
    """Checks that a copy of the layer has its own memory."""
    embed = table("embed", gang, reuse_grad)
    backward(embed, 0)
    twin = copy.deepcopy(embed)
    for step in range(1, STEPS):
        embed.zero_grad()
        twin.zero_grad()
        backward(embed, step)
        backward(twin, step + 50)
    return [embed.weight.grad, twin.weight.grad]


def counted_all_reduce(gang, reuse_grad):
    """Data parallelism by hand: torch does not count the writes to the gradient."""
    group = gang.as_process_group()
    embed = table("embed", FakeGang("cpu"), reuse_grad)
    seen = []
    for step in range(STEPS):
        embed.zero_grad()
        backward(embed, step, seed=gang.rank)
        dist.all_reduce(embed.weight.grad, group=group)
        torch.autograd.graph.increment_version(embed.weight.grad)
        seen.append(embed.weight.grad.clone())
    return seen


def data_parallel(gang, reuse_grad, **options):
    """Trains on two data-parallel ranks of two tensor-parallel ranks each."""
    pairs = [gang.create_gang(ranks) for ranks in ([0, 1], [2, 3])]
    across = [gang.create_gang(ranks) for ranks in ([0, 2], [1, 3])]
    mine = next(pair for pair in pairs if pair)
    group = next(pair for pair in across if pair).as_process_group()
    embed = table("embed", mine, reuse_grad)
    model = DistributedDataParallel(embed, process_group=group, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step, seed=gang.rank // 2)
        seen.append(embed.weight.grad.clone())
        optimizer.step()
    return [*seen, embed.weight.detach()]


def both(gang, function, options):
    return [function(gang, reuse_grad, **options) for reuse_grad in (False, True)]


CASES = {
    "hooks": (2, hooked, {}),
    "step in the backward": (2, step_in_the_backward, {}),
    "copy": (2, copied, {}),
    "all-reduce that is counted": (2, counted_all_reduce, {}),
    "DDP": (4, data_parallel, {}),
    "DDP with gradients in its buckets": (4, data_parallel, {"gradient_as_bucket_view": True}),
    "DDP of a graph that stays": (4, data_parallel, {"static_graph": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_others_do_with_gradients(pool, case):
    size, function, options = CASES[case]
    for expected, seen in pool(size, both, function, options):
        for a, b in zip(seen, expected, strict=True):
            assert_same_bits(a, b, "gradients")
