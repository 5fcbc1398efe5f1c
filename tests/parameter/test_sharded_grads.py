"""Operations of torch and users on a shard's gradient are right for the table, or refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from test_norms import (
    Model,
    assert_close,
    assert_same_on_all_ranks,
    backward,
    gradients,
    models,
    take_gradients,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from parity import assert_same_bits
from tp_embed import FakeGang, ShardedEmbedding, VocabShardedEmbedding, shard_embeddings


def torch_clips_as_whole(gang, strategy, tied):
    expected, model = models(gang, strategy, tied)
    for foreach in (None, True, False):
        for order in (2.0, 1.0, 0.5, 0.0, float("inf")):
            model.zero_grad()
            backward(model)
            take_gradients(expected, model)
            total = get_total_norm(gradients(model), order, foreach=foreach)
            norm = clip_grad_norm_(model.parameters(), 0.1, order, foreach=foreach)
            assert_close(norm, clip_grad_norm_(expected.parameters(), 0.1, order))
            assert_same_bits(total, norm, "both functions")
            assert_same_on_all_ranks(gang, norm)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("tied", [False, True])
def test_clipping_by_torch(pool, strategy, tied):
    for size in (1, 2, 3):
        pool(size, torch_clips_as_whole, strategy, tied)


def reduces_as_whole(gang, strategy):
    expected, model = models(gang, strategy)
    for m in (expected, model):
        m.types.weight.data.zero_()
    backward(model)
    take_gradients(expected, model)
    for name in ("embed", "types"):
        for take in (
            lambda g: g.norm(),
            lambda g: g.norm(p=1),
            lambda g: g.norm(float("inf"), dtype=torch.float64),
            lambda g: g.data.norm(2),
            lambda g: g.detach().float().norm(),
            lambda g: torch.norm(g),
            lambda g: torch.linalg.norm(g),
            lambda g: torch.linalg.vector_norm(g, ord=3),
            lambda g: (g * 2).abs().norm(1),
            lambda g: g.pow(2).sum().sqrt(),
            lambda g: g.sum(dtype=torch.float64),
            lambda g: torch.mean(g.abs()),
            lambda g: g.abs().max(),
            lambda g: torch.min(g),
            lambda g: g.amax(),
            lambda g: torch.isfinite(g).all(),
            lambda g: g.isnan().any(),
            lambda g: (g == 0).any(),
            lambda g: (g == 0).sum(),
            lambda g: torch.stack(torch._foreach_norm([g, torch.ones(3), g], 1)),
        ):
            for whole, part in (
                (expected.get_submodule(name).weight.grad, model.get_submodule(name).weight.grad),
                (expected.get_submodule(name).weight, model.get_submodule(name).weight),
            ):
                with torch.no_grad():
                    wanted, seen = take(whole), take(part)
                assert type(seen) is torch.Tensor
                torch.testing.assert_close(seen, wanted, rtol=1e-6, atol=1e-7)
                assert_same_on_all_ranks(gang, seen.double())
        whole, part = (m.get_submodule(name).weight for m in (expected, model))
        torch.testing.assert_close(part.grad.view(-1).norm(), whole.grad.norm())
        with torch.no_grad():
            for take in (torch.norm, torch.sum, torch.max, lambda w: w.abs().amin(), torch.mean):
                torch.testing.assert_close(take(part.view(-1)), take(whole.view(-1)))


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_reductions(pool, strategy):
    for size in (1, 2, 3):
        pool(size, reduces_as_whole, strategy)


def decays_by_the_loss(gang, strategy):
    """Adds a penalty on the weights to the loss."""
    expected, model = models(gang, strategy)
    for m in (expected, model):
        sum(p.pow(2).sum() for p in m.parameters()).backward()
        torch.mean(m.embed.weight * 2).backward()
        (m.embed.weight.view(-1) ** 2).mean().backward()
        m.types.weight.flatten().abs().sum().backward()
    for name in ("embed", "types"):
        grad = model.get_submodule(name).weight.grad.full_tensor()
        torch.testing.assert_close(grad, expected.get_submodule(name).weight.grad)
    with pytest.raises(ValueError, match=r"`norm` must be given the whole table"):
        model.embed.weight.norm()
    vector = nn.utils.parameters_to_vector(model.parameters())
    for read in (torch.norm, torch.sum, lambda v: (v * 2).max(), lambda v: v @ v):
        for v in (vector, vector.detach()):
            with pytest.raises(ValueError, match="a vector of Parameters of"):
                read(v)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_penalties(pool, strategy):
    for size in (2, 3):
        pool(size, decays_by_the_loss, strategy)


def skips_together(gang, strategy, sparse):
    """If one rank has a non-finite gradient, all ranks skip the step."""
    _, model = models(gang, strategy, sparse=sparse)
    tables = [model.embed, model.types]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for bad in (False, True, False):
        sgd.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, scale=scaler.get_scale())
        if bad and gang.rank == gang.size - 1:
            grad = model.embed.weight.grad.to_local()
            (grad._values() if sparse else grad)[0, 0] = torch.inf
        scale = scaler.get_scale()
        scaler.step(sgd)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if bad else scale)
        after = list(model.parameters())
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old.to_local() if hasattr(old, "gang") else old, new) is bad or (
                new.numel() == 0 or any(new is t.weight for t in tables)
            )
    found = torch.tensor(scaler.get_scale())
    assert_same_on_all_ranks(gang, found)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("sparse", [False, True])
def test_grad_scaler(pool, strategy, sparse):
    for size in (2, 3):
        pool(size, skips_together, strategy, sparse)


def shards():
    for kind in (ShardedEmbedding, VocabShardedEmbedding):
        embed = kind(FakeGang("cpu", rank=1, size=2), 6, 6)
        embed(torch.tensor([1, 4])).sum().backward()
        yield embed


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("mean", lambda g: (g**2).mean(-1)),
        ("sum", lambda g: g.sum(dim=-2)),
        ("norm", lambda g: g.norm(dim=1)),
        ("linalg_matrix_norm", lambda g: torch.linalg.matrix_norm(g)),
        ("linalg_norm", lambda g: torch.linalg.norm(g, 2)),
        ("norm", lambda g: g.norm("nuc")),
        ("std", lambda g: g.std()),
        ("matmul", lambda g: g @ torch.ones(g.size(1), 2)),
        ("T", lambda g: g.T),
        ("T", lambda g: g.bfloat16().T),
        ("t", lambda g: g.t()),
        ("mm", lambda g: g.mm(torch.ones(g.size(1), 2))),
        ("linalg_svd", lambda g: torch.linalg.svd(g)),
        ("dot", lambda g: g.view(-1).dot(torch.ones(g.numel()))),
        ("cat", lambda g: torch.cat([g.view(-1), torch.ones(2)])),
        ("__getitem__", lambda g: g[0]),
        ("__setitem__", lambda g: g.__setitem__(0, 0.0)),
        ("topk", lambda g: g.topk(1)),
        ("normalize", lambda g: nn.functional.normalize(g)),
    ],
)
def test_refused_reads(name, read):
    for embed in shards():
        with pytest.raises(ValueError, match=rf"`{name}` must be given the whole table, but is"):
            read(embed.weight.grad)


def test_gradients_stay_what_they_are():
    for embed in shards():
        weight = embed.weight
        grad, storage = weight.grad, weight.grad.untyped_storage().data_ptr()
        assert weight.grad is grad
        assert grad.gang is embed.gang
        assert type(grad.to_local()) is torch.Tensor
        file = io.BytesIO()
        torch.save({"grad": grad}, file)
        file.seek(0)
        for loaded in (torch.load(file)["grad"], pickle.loads(pickle.dumps(grad))):
            assert type(loaded) is torch.Tensor
            assert torch.equal(loaded, grad.to_local())
        copied = copy.deepcopy(grad)
        assert copied.gang is embed.gang
        assert torch.equal(copied.to_local(), grad.to_local())
        assert copy.deepcopy(embed).weight.grad is None
        assert torch.is_tensor(grad)
        embed(torch.tensor([1, 1])).sum().backward()  # Adds to the same memory.
        assert weight.grad is grad
        assert grad.untyped_storage().data_ptr() == storage
        grad.data = torch.ones_like(grad)
        assert weight.grad.sum() == 2 * weight.numel()
        weight.grad = torch.zeros(weight.shape)
        assert weight.grad.norm() == 0
        (of_loss,) = torch.autograd.grad(embed(torch.tensor([1, 4])).sum(), weight)
        assert of_loss.norm() == pytest.approx(12.0**0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=False),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.RAdam(p),
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
        lambda p: torch.optim.Rprop(p),
        lambda p: torch.optim.ASGD(p),
    ],
)
def test_saved_states_are_plain(make):
    """Checkpoints of optimizers hold no shards, since these refer to processes."""
    for embed in shards():
        optimizer = make(embed.parameters())
        optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file)["state"][0]
        assert {type(v) for v in state.values() if v is not None} <= {torch.Tensor, float, int}


def behind_ddp(gang, strategy):
    """Each process is a replica: shards of a gang without processes."""
    model = Model(tied=False)
    shard_embeddings(model, FakeGang("cpu", rank=1, size=2), strategy=strategy)
    wrapped = DistributedDataParallel(
        model, process_group=gang.as_process_group(), gradient_as_bucket_view=True
    )
    optimizer = torch.optim.AdamW(wrapped.parameters())
    for step in range(3):
        optimizer.zero_grad(set_to_none=step == 1)
        wrapped(torch.arange(8).view(2, 4)).sum().backward()
        clip_grad_norm_(wrapped.parameters(), 1.0)
        assert hasattr(model.embed.weight.grad, "gang")
        optimizer.step()
    dist.all_reduce(model.embed.weight.grad, group=gang.as_process_group())


def test_behind_ddp(pool):
    for strategy in ("embed", "vocab"):
        pool(2, behind_ddp, strategy)
