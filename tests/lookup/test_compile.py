"""Compares models that torch.compile compiles as one graph with the same models in eager mode."""

from __future__ import annotations

import copy
import gc
import os
import pickle

import pytest
import torch
import torch._dynamo
from torch import library, nn
from torch._dynamo.testing import CompileCounterWithBackend

from parity import SHARDED, assert_same_bits
from tp_embed import BatchLayout, FakeGang, OutputHead, StandardEmbedding, VocabShardedEmbedding
from tp_embed.gang.graph_ops import _NAMED

V, E = 23, 6
# The first two tell torch which sizes change; size 1 always gets its own graph.
SHAPES = [(2, 5), (3, 8), (7, 9), (2, 6), (4, 12)]

OPTIONS = [
    {},
    {"dedup": True, "pad_idx": 3, "scale": 0.5},
    {"dedup": False, "scale": torch.tensor(1.7)},
    {"output": "sequence"},
    {"output": "sequence", "dedup": True, "dtype": torch.bfloat16},
    {"output": "sequence", "dedup": False, "reuse_grad": True},
]
SHARD = {"output": "shard", "pad_idx": 0}

CASES = [(kind, options) for kind in sorted(SHARDED) for options in OPTIONS] + [("embed", SHARD)]


def build(gang, kind, output="replicated", dedup="auto", **options):
    table = StandardEmbedding(V, E, **options)
    if kind == "standard":
        return table
    return SHARDED[kind].from_embedding(table, gang, output=output, dedup=dedup)


class Two(nn.Module):
    """Has two tables, which must not be mixed up."""

    def __init__(self, gang, kind, **options):
        super().__init__()
        self.first = build(gang, kind, **options)
        self.second = build(gang, kind, **options)

    def forward(self, ids, layout=None):
        return self.first(ids, layout) - self.second(ids + 1, layout)


def assert_same_step(compiled, model, *args):
    """Checks that a forward and a backward of both give the same bits."""
    expected, output = model(*args), compiled(*args)
    assert_same_bits(output.detach(), expected.detach(), "outputs")
    generator = torch.Generator().manual_seed(output.size(-2))
    grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    gradients = []
    for result in (expected, output):
        result.backward(grad)
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        assert_same_bits(theirs, ours, "gradients")


def train(gang, kind, options, backend, padded=False):
    """Returns the number of compiled graphs."""
    torch._dynamo.reset()
    model = Two(gang, kind, **options)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch, (rows, width) in enumerate(SHAPES):
        # From one distinct id to about all of them.
        ids = torch.randint(1 + batch * (V - 2) // len(SHAPES), (rows, width))
        layout = BatchLayout.of(ids, [width - row % 2 for row in range(rows)]) if padded else None
        assert_same_step(compiled, model, ids, layout)
    return counter.frame_count


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_one_graph_for_all_batches_gives_the_same_bits(pool, kind, options):
    assert pool(2, train, kind, options, "aot_eager") == [2, 2]


@pytest.mark.parametrize("kind", ["standard", *sorted(SHARDED)])
def test_alone(kind):
    assert train(FakeGang("cpu"), kind, {"pad_idx": 3, "scale": 2.0}, "aot_eager") == 2


@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_ranks_with_short_blocks_and_without_any(pool, kind):
    """The last of four ranks gets none of 5, 6 or 9 positions."""
    counts = pool(4, train, kind, {"output": "sequence"}, "aot_eager")
    assert max(counts) <= 3  # Sizes 0 and 1 get their own graphs.


@pytest.mark.parametrize("output", ["replicated", "sequence"])
@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_padding_is_no_part_of_a_graph(pool, kind, output):
    assert pool(2, train, kind, {"output": output}, "aot_eager", padded=True) == [2, 2]


def compile_with_inductor(gang, cache):
    """The ranks share a cache of compiled graphs, but get parts of different sizes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch._dynamo.reset()
    ids = torch.randint(V, (3, 7))
    for kind in sorted(SHARDED):
        # Needs no C++ compiler.
        model = nn.Sequential(build(gang, kind, output="sequence"), nn.Linear(E, 4, bias=False))
        compiled = torch.compile(model, fullgraph=True)
        assert_same_step(compiled, model, ids)


def test_inductor(pool, tmp_path):
    pool(2, compile_with_inductor, str(tmp_path))


class Tied(nn.Module):
    def __init__(self, gang, kind, **options):
        super().__init__()
        self.embed = build(gang, kind, **options)
        self.block = nn.Linear(E, E)
        self.head = OutputHead(self.embed)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


def train_tied(gang, kind):
    torch._dynamo.reset()
    model = Tied(gang, kind)
    expected = copy.deepcopy(model)
    expected.head.weight = expected.embed.weight
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for shape in SHAPES:
        ids = torch.randint(V, shape)
        for m, f in ((model, compiled), (expected, expected)):
            m.zero_grad()
            m.output = f(ids)
            m.output.square().sum().backward()
        torch.testing.assert_close(model.output, expected.output)
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    return counter.frame_count


@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_a_tied_head_is_in_the_graph(pool, kind):
    assert pool(2, train_tied, kind) == [2, 2]


def ask_out_of_range(gang, kind):
    torch._dynamo.reset()
    model = Two(gang, kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    good = torch.tensor([[1, 2, 3]])
    assert_same_step(compiled, model, good)
    with pytest.raises(IndexError, match=rf"position \(0, 1\) is {V} instead.*rank={gang.rank}"):
        compiled(torch.tensor([[1, V, 3]]))
    assert_same_step(compiled, model, good)


@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_ids_out_of_range_are_errors_on_every_rank(pool, kind):
    pool(2, ask_out_of_range, kind)


def test_sparse_gradients_break_the_graph_and_nothing_else():
    torch._dynamo.reset()
    embed = build(FakeGang("cpu", size=2), "embed", sparse=True)
    ids = torch.tensor([[1, 5, 1]])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no sparse gradients: pass `sparse=F"):
        torch.compile(embed, backend="aot_eager", fullgraph=True)(ids)
    embed(ids).sum().backward()
    expected, embed.weight.grad = embed.weight.grad, None
    torch.compile(embed, backend="aot_eager")(ids).sum().backward()
    assert embed.weight.grad.is_coalesced()
    assert torch.equal(embed.weight.grad.indices(), expected.indices())
    assert torch.equal(embed.weight.grad.values(), expected.values())


def test_each_copy_is_a_table_of_its_own():
    embed = build(FakeGang("cpu"), "vocab")
    copies = [copy.deepcopy(embed), copy.copy(embed), pickle.loads(pickle.dumps(embed))]
    compiled = torch.compile(nn.Sequential(embed, nn.Flatten()), backend="aot_eager")
    ids = torch.tensor([[2, 4]])
    compiled(ids)
    for pad_idx, other in enumerate(copies):
        other.pad_idx = pad_idx
        other.weight = nn.Parameter(torch.randn(V, E))
        again = torch.compile(other, backend="aot_eager", fullgraph=True)
        ids = torch.tensor([0, 1, 2])
        output = again(ids)
        assert_same_bits(output.detach(), other.weight[ids].detach(), "outputs")
        output.sum().backward()
        used = [row for row in range(3) if row != pad_idx]
        assert other.weight.grad.any(1).nonzero()[:, 0].tolist() == used
    assert len({e._lookup.handle for e in (embed, *copies)}) == 4


def test_tables_are_not_kept_alive():
    embed = build(FakeGang("cpu"), "embed")
    handle = embed._lookup.handle
    assert _NAMED[handle] is embed._lookup
    del embed
    gc.collect()
    assert handle not in _NAMED


def test_without_gradients():
    torch._dynamo.reset()
    model = Two(FakeGang("cpu", rank=1, size=2), "embed")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[1, 2, 3]])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_same_bits(compiled(ids), model(ids), "outputs")
    model.requires_grad_(False)
    assert not compiled(ids).requires_grad


@pytest.mark.parametrize("real", [None, torch.tensor([[True, False, True]])])
def test_torch_finds_the_operators_sound(real):
    embed = VocabShardedEmbedding(FakeGang("cpu", rank=1, size=2), V, E)
    ids = torch.tensor([[2, 20, 2]])
    args = embed.weight, ids, real, [1, 3, E], embed._lookup.handle
    library.opcheck(torch.ops.tp_embed.look_up.default, args)
    grad = torch.randn(1, 3, E)
    args = grad, ids, real, list(embed.weight.shape), embed._lookup.handle
    library.opcheck(torch.ops.tp_embed.look_up_backward.default, args)
