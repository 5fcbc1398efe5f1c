"""Layers do not change under torch's default device and dtype, threads, or its fake backend."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from parity import SHARDED, assert_same_bits
from tp_embed import (
    BatchLayout,
    FakeGang,
    OutputHead,
    ProcessGroupGang,
    StandardEmbedding,
    shard_embeddings,
)
from tp_embed.gang.graph_ops import all_gather, all_reduce, look_up, register
from tp_embed.nn import init
from tp_embed.nn.loss import cross_entropy

V, E = 11, 6
IDS = [[1, 2, 3, 3], [5, 6, 10, 0]]
LAYERS = [
    ("embed", "replicated"),
    ("embed", "sequence"),
    ("embed", "shard"),
    ("vocab", "replicated"),
    ("vocab", "sequence"),
]


@contextmanager
def defaults(device, dtype):
    """Models are often built under ``meta``, and scripts often set a default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def tensors():
    generator = torch.Generator("cpu").manual_seed(3)
    table = torch.randn(V, E, generator=generator, device="cpu", dtype=torch.float32)
    ids = torch.tensor(IDS, device="cpu")
    return table, ids, BatchLayout.of(ids, [4, 3])


def lookups(gang, device, dtype):
    """Returns the outputs of layers built before setting the defaults, or under them."""
    table, ids, layout = tensors()
    found = []
    with defaults(device, dtype):
        for kind, output in [*LAYERS, ("standard", "replicated")]:
            for dedup in (True, False):
                whole = StandardEmbedding(V, E, 3, device="cpu", dtype=torch.float32)
                whole.weight.data.copy_(table)
                embed = whole
                if kind != "standard":
                    embed = SHARDED[kind].from_embedding(whole, gang, output=output, dedup=dedup)
                for given in (None, layout):
                    result = embed(ids, given)
                    result.square().sum().backward()
                    found += [result.detach(), embed.weight.grad.clone()]
                with pytest.raises(IndexError, match=r"position \(1, 3\) is 11 instead"):
                    embed(ids + 11)
                if kind != "standard":
                    found.append(embed.to_embedding().weight.detach())
        for kind in SHARDED:
            embed = SHARDED[kind](
                gang, V, E, init_fn=init.normal, device="cpu", dtype=torch.float32
            )
            found.append(embed.weight.detach())
            found += losses(gang, OutputHead(embed), embed, ids)
        model = nn.Sequential(nn.Embedding(V, E, device="cpu", dtype=torch.float32))
        model[0].weight.data.copy_(table)
        shard_embeddings(
            model, gang, strategy="vocab", optimizer=torch.optim.SGD(model.parameters())
        )
        found.append(model(ids).detach())
    return found


def losses(gang, head, embed, ids):
    target = ids.flip(1).clone()
    target[0, 0] = -100
    hidden = embed(ids).detach().requires_grad_()
    found = [head(hidden).detach()]
    for options in ({}, {"reduction": "sum"}):
        loss = head.loss(hidden, target, **options)
        loss.sum().backward()
        found.append(loss.detach())
    if head.shard_dim == 0:
        head.output = "shard"
        logits = head(hidden)
        loss = cross_entropy(logits, target, gang, head.partition)
        loss.backward()
        found.append(loss.detach())
    return [*found, hidden.grad, embed.weight.grad]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_torch_change_nothing(pool, dtype, device, size):
    expected = pool(size, lookups, "cpu", torch.float32)
    for found, wanted in zip(pool(size, lookups, device, dtype), expected, strict=True):
        for number, (x, y) in enumerate(zip(found, wanted, strict=True)):
            assert x.device == y.device
            assert_same_bits(x, y, number)


def turn(embed, ids, grad):
    output = embed(ids)
    (gradient,) = torch.autograd.grad(output, embed.weight, grad)
    return output.detach().clone(), gradient.clone()


@pytest.mark.parametrize("reuse_grad", [False, True])
@pytest.mark.parametrize(("kind", "output"), [*LAYERS, ("standard", "replicated")])
def test_threads_do_not_share_memory(kind, output, reuse_grad):
    """Each thread looks up its own ids, many times; gangs that send nothing need no order."""
    sizes = 512, 64
    if kind == "standard":
        embed = StandardEmbedding(*sizes, reuse_grad=reuse_grad)
    else:
        gang = FakeGang("cpu", rank=1, size=2)
        embed = SHARDED[kind](gang, *sizes, output=output, reuse_grad=reuse_grad, check_ids=False)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(sizes[0], (4, 128), generator=generator) for _ in range(4)]
    grads = [torch.randn(embed(ids).shape, generator=generator) for ids in batches]
    expected = [turn(embed, *each) for each in zip(batches, grads, strict=True)]

    def work(number):
        for _ in range(40):
            found = turn(embed, batches[number], grads[number])
            for x, y in zip(found, expected[number], strict=True):
                assert_same_bits(x, y, number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    for again in (copy.deepcopy(embed), pickle.loads(pickle.dumps(embed))):
        assert_same_bits(turn(again, batches[0], grads[0])[0], expected[0][0], "copy")


def test_a_graph_that_outlives_its_table():
    class Table:
        pass

    table = Table()
    handle = register(table)
    del table
    gc.collect()
    x = torch.ones(2, E)
    for call in (
        lambda: look_up(x, torch.tensor([1]), None, [1, E], handle),
        lambda: all_gather(x, 2, handle),
        lambda: all_reduce(x, handle),
    ):
        with pytest.raises(RuntimeError, match=f"table or gang number {handle} .* is gone: a gra"):
            call()


@pytest.fixture
def fake_group():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def test_fake_backend_is_refused(fake_group):
    with pytest.raises(ValueError, match=r"has torch's 'fake' .*Use a `FakeGang\(device, rank="):
        ProcessGroupGang(None, "cpu")
