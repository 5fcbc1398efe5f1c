"""Lookups under autograd, `torch.func` and tracers give what `torch.nn.Embedding` gives."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from tp_embed import FakeGang, ShardedEmbedding, StandardEmbedding, VocabShardedEmbedding
from tp_embed.gang.collectives import gather_table
from tp_embed.parameter.sharded import ShardedParameter, local

V, E, PAD = 7, 5, 2
IDS = torch.tensor([[1, 2, 2, 3], [6, 0, 3, 3]])
SHARDED = {"embed": ShardedEmbedding, "vocab": VocabShardedEmbedding}
KINDS = {"standard": None, **SHARDED}
SIZES = [1, 2, 3]


def tables(gang, kind, **options) -> tuple[nn.Embedding, Any]:
    """Builds the same table with torch and with our class, in fp64."""
    torch.manual_seed(0)
    theirs = nn.Embedding(V, E, padding_idx=PAD, dtype=torch.float64)
    standard = StandardEmbedding(V, E, PAD, dtype=torch.float64)
    standard.weight.data.copy_(theirs.weight.data)
    if KINDS[kind] is None:
        return theirs, standard
    return theirs, KINDS[kind].from_embedding(standard, gang, **options)


def whole(embed: Any, shard: Tensor) -> Tensor:
    """Gathers the table, or its gradient, from the ``shard`` of each rank."""
    if isinstance(embed, StandardEmbedding) or embed.gang.size == 1:
        return shard
    output = shard.new_empty(V, E)
    own = shard.detach().contiguous()
    gather_table(output, own, embed.shard_dim, embed.gang, embed.partition)
    return output


def cut(embed: Any, table: Tensor) -> Tensor:
    rows, columns = embed.rows, embed.columns
    return table[rows.start : rows.stop, columns.start : columns.stop].clone()


def over(names: str, values: Any) -> Any:
    return pytest.mark.parametrize(names, values)


def write_in_place(gang, kind):
    for write in (
        lambda h: h.mul_(2.0),
        lambda h: h.__setitem__((0, 1), 3.0),
        lambda h: h.add_(torch.ones(E, dtype=h.dtype)),
        lambda h: torch.nn.functional.relu(h, inplace=True),
        lambda h: h.masked_fill_(h > 0.5, 0.0),
    ):
        grads = []
        theirs, ours = tables(gang, kind)
        for embed in (theirs, ours):
            h = embed(IDS)
            write(h)
            h.square().sum().backward()
            grads.append(whole(embed, embed.weight.grad) if embed is ours else embed.weight.grad)
        assert torch.equal(*grads)


@over("size", SIZES)
@over("kind", KINDS)
def test_outputs_can_be_written_to_in_place(pool, size, kind):
    pool(size, write_in_place, kind)


def change_ids(gang, kind, options):
    _, embed = tables(gang, kind, **options)
    ids = IDS.clone()
    loss = embed(ids).sum()
    ids.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    ids = IDS.to(torch.int16)  # The lookup has a copy.
    loss = embed(ids).sum()
    ids.fill_(1)
    loss.backward()
    loss = embed(IDS).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@over("size", SIZES)
@over("kind,options", [(k, {}) for k in KINDS] + [("embed", {"output": "sequence"})])
def test_ids_are_saved_for_the_backward(pool, size, kind, options):
    pool(size, change_ids, kind, options)


def save_elsewhere(gang, kind):
    theirs, ours = tables(gang, kind)
    for embed in (theirs, ours):
        ids, seen = IDS.clone(), []

        def pack(x, seen=seen):
            seen.append(x)
            return x.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = (embed(ids) * torch.arange(E)).sum()
        ids.fill_(1)  # The hooks have a copy.
        loss.backward()
        assert any(x is ids for x in seen)
    assert torch.equal(whole(ours, ours.weight.grad), theirs.weight.grad)


@over("size", SIZES)
@over("kind", KINDS)
def test_hooks_of_saved_tensors_have_the_last_word(pool, size, kind):
    pool(size, save_elsewhere, kind)


def replace_ids(gang, kind, options):
    theirs, ours = tables(gang, kind, **options)
    for embed in (theirs, ours):
        ids = IDS.clone()

        def unpack(x, ids=ids):
            if x is not ids:
                return x
            ids.data.copy_(IDS.flip(-1))  # Without a new version.
            return ids.view_as(ids)  # Another tensor in the same memory.

        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            output = embed(ids)
            factors = torch.arange(1.0, 1 + len(IDS[0]))[:, None]
            if options.get("output") == "sequence" and embed is ours:
                block = -(-len(factors) // gang.size)
                factors = factors[gang.rank * block : (gang.rank + 1) * block]
            loss = (output * factors).sum()
        loss.backward()
    assert torch.equal(whole(ours, ours.weight.grad), theirs.weight.grad)


@over("size", SIZES)
@over(
    "kind,options", [(kind, {}) for kind in KINDS] + [(k, {"output": "sequence"}) for k in SHARDED]
)
def test_hooks_can_replace_ids_in_the_same_memory(pool, size, kind, options):
    pool(size, replace_ids, kind, options)


def differentiate_twice(gang, kind):
    theirs, ours = tables(gang, kind)
    torch.manual_seed(1)
    mixes = nn.Linear(E, 3, dtype=torch.float64)
    v, u = torch.randn(V, E, dtype=torch.float64), torch.randn(3, E, dtype=torch.float64)
    found = []
    for embed in (theirs, ours):
        loss = torch.tanh(mixes(embed(IDS))).square().sum()
        parameters = embed.weight, mixes.weight
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        vector = v if embed is theirs else cut(ours, v)
        second = torch.autograd.grad(first, parameters, (vector, u), create_graph=True)
        third = torch.autograd.grad(second, parameters, (vector, u))
        tables_of = [first[0], second[0], third[0]]
        if embed is ours:
            tables_of = [whole(ours, x) for x in tables_of]
        found.append([*tables_of, first[1], second[1], third[1]])
    for ours_, theirs_ in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-12, atol=1e-12)


@over("size", SIZES)
@over("kind", KINDS)
def test_derivatives_of_any_order(pool, size, kind):
    pool(size, differentiate_twice, kind)


def refuse_sparse(gang, kind):
    _, embed = tables(gang, kind)
    embed.sparse = True
    with pytest.raises(RuntimeError, match="`sparse` must be False for derivatives"):
        torch.autograd.grad(embed(IDS).square().sum(), embed.weight, create_graph=True)


@over("size", SIZES)
@over("kind", KINDS)
def test_sparse_gradients_have_no_derivatives(pool, size, kind):
    pool(size, refuse_sparse, kind)


def transform(gang, kind):
    theirs, ours = tables(gang, kind)
    weights = torch.randn(3, V, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def results(embed: Any, tables_of: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def f(weight: Tensor, ids: Tensor) -> Tensor:
            return torch.tanh(functional_call(embed, {"weight": weight}, (ids,))).sum((0, 1))

        def loss(weight: Tensor, ids: Tensor) -> Tensor:
            return f(weight, ids).square().sum()

        stacked, (first, second, _) = torch.stack(tables_of), tables_of
        batch = torch.stack([IDS, IDS.flip(0), IDS.flip(1)])
        out, tangent = jvp(lambda w: f(w, IDS), (first,), (second,))
        outputs = [
            vmap(lambda ids: f(first, ids))(batch),
            vmap(lambda ids: f(first, ids), in_dims=1)(batch.movedim(0, 1)),
            vmap(f, in_dims=(0, None))(stacked, IDS),
            vmap(f)(stacked, batch),
            out,
            tangent,
        ]
        gradients = [
            grad(loss)(first, IDS),
            *vmap(grad(loss), in_dims=(None, 0))(first, batch),
            *vmap(grad(loss), in_dims=(0, None))(stacked, IDS),
            *vmap(grad(loss))(stacked, batch),
        ]
        return outputs, gradients

    outputs, gradients = results(ours, [cut(ours, table) for table in weights])
    found = outputs + [whole(ours, gradient) for gradient in gradients]
    for one, other in zip(found, itertools.chain(*results(theirs, list(weights))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@over("size", SIZES)
@over("kind", KINDS)
def test_transforms_of_torch_func(pool, size, kind):
    pool(size, transform, kind)


def test_hessians_of_a_whole_table():
    theirs, ours = tables(FakeGang("cpu"), "standard")

    def loss(embed: Any) -> Any:
        return lambda w: functional_call(embed, {"weight": w}, (IDS,)).pow(3).sum()

    weight = theirs.weight.detach()
    torch.testing.assert_close(hessian(loss(ours))(weight), hessian(loss(theirs))(weight))


def trace(gang, kind):
    _, embed = tables(gang, kind)
    model = nn.Sequential(embed)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(IDS)).shape == (2, 4, E)
    weight = {"0.weight": local(embed.weight).clone()}
    if isinstance(embed.weight, ShardedParameter):
        with pytest.raises(TypeError, match="`make_fx` must be given the weights"):
            make_fx(model)(IDS)
    graph = make_fx(lambda weight, ids: functional_call(model, weight, (ids,)))(weight, IDS)
    assert torch.equal(graph(weight, IDS.flip(0)), model(IDS.flip(0)))
    exported = torch.export.export(model, (IDS,)).module()
    assert torch.equal(exported(IDS.flip(0)), model(IDS.flip(0)))


@over("size", SIZES)
@over("kind", KINDS)
def test_graphs_hold_the_lookup_as_an_operator(pool, size, kind):
    pool(size, trace, kind)


def record(gang, kind):
    _, embed = tables(gang, kind)
    model = nn.Sequential(embed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, recorder in (
            ("script", lambda: torch.jit.script(model)),
            ("trace", lambda: torch.jit.trace(model, IDS)),
            ("symbolic_trace", lambda: torch.fx.symbolic_trace(model)),
        ):
            with pytest.raises(TypeError, match=rf"{name}` must .* Use `torch.compile` or"):
                recorder()


@over("size", SIZES)
@over("kind", KINDS)
def test_recorders_that_miss_collectives_are_refused(pool, size, kind):
    pool(size, record, kind)


def copy_before_backward(gang, kind):
    theirs, ours = tables(gang, kind)
    for embed in (theirs, ours):
        twin = copy.deepcopy(embed)
        (embed(IDS).square().sum() + twin(IDS).sum()).backward()
    assert torch.equal(whole(ours, ours.weight.grad), theirs.weight.grad)


@over("size", SIZES)
@over("kind", KINDS)
def test_copies_have_gradients_of_their_own(pool, size, kind):
    pool(size, copy_before_backward, kind)
