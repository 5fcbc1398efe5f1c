"""A shard is never read as the table; elementwise operations pass."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter, functional
from torch.nn.utils import prune

from tp_embed import (
    FakeGang,
    OutputHead,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.parameter.sharded import ShardedParameter, ShardedTensor, as_shard, local

V, E = 9, 6
KINDS = [ShardedEmbedding, VocabShardedEmbedding]


class Fused(torch.autograd.Function):
    """Multiplies by the weight in its forward, as fused losses do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


X = torch.ones(2, E)
READS = {
    "linear": lambda w: functional.linear(X, w),
    "linear in fp64": lambda w: functional.linear(X.double(), w.double()),
    "matmul": lambda w: X @ w.T,
    "matmul of data": lambda w: w.data @ X.T,
    "matmul of a copy": lambda w: X @ w.detach().clone().t(),
    "product of rows": lambda w: w @ w.mT,
    "einsum": lambda w: torch.einsum("ve,ne->nv", w, X),
    "addmm": lambda w: torch.addmm(torch.zeros(()), X, w.t()),
    "fused": lambda w: Fused.apply(X, w),
    "embedding": lambda w: functional.embedding(torch.tensor([1]), w),
    "embedding_bag": lambda w: functional.embedding_bag(torch.tensor([[1]]), w),
    "row": lambda w: w[1],
    "rows": lambda w: w[torch.tensor([1, 2])],
    "first rows": lambda w: w[:3],
    "rows of data": lambda w: w.data[-1],
    "write a row": lambda w: w.data.__setitem__(1, 0.0),
    "index_select": lambda w: w.index_select(0, torch.tensor([0])),
    "gather": lambda w: w.gather(0, torch.zeros(1, E, dtype=torch.long)),
    "index_copy_": lambda w: w.data.index_copy_(0, torch.tensor([0]), torch.ones(1, E)),
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "adjoint": lambda w: w.H,
    "other shape": lambda w: w.unsqueeze(0),
    "cat": lambda w: torch.cat([w, torch.ones(1, w.size(1))]),
    "stack": lambda w: torch.stack([w]),
    "mean over rows": lambda w: w.mean(0),
    "sum over columns": lambda w: w.sum(-1),
    "std": lambda w: w.std(),
    "max": lambda w: w.max(),
    "argmax": lambda w: w.argmax(),
    "norm of rows": lambda w: w.norm(dim=-1),
    "renorm": lambda w: w.data.renorm_(2, 0, 1.0),
    "normalize": lambda w: functional.normalize(w, dim=-1),
    "cosine": lambda w: functional.cosine_similarity(w, X[:1]),
    "cdist": lambda w: torch.cdist(X, w),
    "svd": lambda w: torch.linalg.svd(w),
    "topk": lambda w: w.topk(1),
    "iterate": lambda w: list(w),
    "list": lambda w: w.tolist(),
    "numpy": lambda w: w.detach().numpy(),
    "draw": lambda w: nn.init.normal_(w),
    "draw in data": lambda w: w.data.uniform_(),
    "xavier": lambda w: nn.init.xavier_uniform_(w),
    "dropout": lambda w: functional.dropout(w),
    "softmax": lambda w: w.softmax(-1),
    "layer norm": lambda w: functional.layer_norm(w, (w.size(1),)),
    "whole table": lambda w: w + torch.ones(V, E),
    "copy a whole table": lambda w: w.data.copy_(torch.ones(V, E)),
    "length": len,
    "into a whole table": lambda w: torch.ones(2, *w.shape).add_(w),
    "broadcast": lambda w: w + torch.ones(2, *w.shape),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_of_the_table_are_refused(read, kind, size):
    embed = kind(FakeGang("cpu", rank=1, size=size), V, E)
    with pytest.raises(ValueError, match=r"must be given the whole table.*weight.full_tensor\(\)"):
        read(embed.weight)
    head = OutputHead(embed)
    with pytest.raises(ValueError, match="must be given the whole table"):
        read(head.weight)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_whole_table_is_a_parameter(read):
    for embed in (StandardEmbedding(V, E), *(kind(FakeGang("cpu"), V, E) for kind in KINDS)):
        assert type(embed.weight) is Parameter
        if read is not READS["write a row"]:
            read(embed.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_by_the_largest_of_a_shard_is_refused(kind):
    embed = kind(FakeGang("cpu", size=2), V, E)
    with pytest.raises(ValueError, match="must not come from `weight_orig`"):
        prune.l1_unstructured(embed, "weight", 0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_are_refused_in_compiled_code(kind):
    embed = kind(FakeGang("cpu", size=2), V, E)

    @torch.compile(backend="eager")
    def logits(x):
        return functional.linear(x, embed.weight)

    with pytest.raises(Exception, match="must be given the whole table"):
        logits(X)


def item_by_item(w):
    """Runs operations that return shards."""
    mask = torch.ones_like(w)
    return [
        w.detach(),
        w.data,
        w.clone(),
        w.to(torch.float64),
        w.half(),
        w * 2,
        1 - w,
        w + w.detach(),
        w.pow(2),
        w.abs().sqrt(),
        w.masked_fill(mask > 0, 0.0),
        torch.where(mask > 0, w, 0.0),
        w.view(w.shape),
        w.view(-1),
        w.reshape(-1),
        w.flatten(),
        w > 0,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_item_by_item_is_a_shard(kind):
    embed = kind(FakeGang("cpu", rank=1, size=2), V, E)
    for made in item_by_item(embed.weight):
        assert type(made) is ShardedTensor
        assert made.numel() == embed.weight.numel()
        with pytest.raises(ValueError, match="must be given the whole table"):
            made @ X.T


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_metadata_are_plain(kind):
    w = kind(FakeGang("cpu", rank=1, size=2), V, E).weight
    plain = [
        w.view(-1)[2:],
        w.reshape(-1).narrow(0, 1, 2),
        w.flatten().view(-1, 3),
        w.data.view(torch.uint8),
        torch.zeros_like(w),
        w.new_zeros(3),
        nn.utils.parameters_to_vector([w])[1:],
        w.to_local(),
        local(w),
    ]
    assert {type(x) for x in plain} == {torch.Tensor}
    assert w.to_local().data_ptr() == w.data_ptr()
    w.to_local().sum().backward()
    assert torch.equal(w.grad.data, torch.ones_like(w))
    assert (w.ndim, w.numel(), w.dtype, w.is_leaf) == (2, w.nelement(), torch.float32, True)
    assert "on FakeGang(rank=1, size=2" in repr(w)


def full_tensors(gang):
    torch.manual_seed(0)
    whole = StandardEmbedding(V, E)
    for kind in KINDS:
        embed = kind.from_embedding(whole, gang)
        if gang.size > 1:
            assert type(embed.weight) is ShardedParameter
            weights: list[Any] = [embed.weight, embed.weight.detach(), OutputHead(embed).weight]
            for weight in weights:
                full = weight.full_tensor()
                assert type(full) is torch.Tensor
                assert torch.equal(full, whole.weight)
        decay = (embed.weight.square().sum() - 3 * embed.weight.mean()).backward()
        assert decay is None
    ((whole.weight.square().sum()) - 3 * whole.weight.mean()).backward()
    rows, columns = embed.rows, embed.columns
    expected = whole.weight.grad[rows.start : rows.stop, columns.start : columns.stop]
    torch.testing.assert_close(embed.weight.grad.data, expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_table_is_gathered_and_penalties_are_those_of_the_table(pool, size):
    pool(size, full_tensors)


def dtypes_of_empty_shards(gang):
    for kind in KINDS:
        weight = kind(gang, 1, 1).weight
        values = torch.full(local(weight).shape, 2.0)
        shard: Any = as_shard(values if values.numel() else values.bfloat16(), weight)
        whole = shard.full_tensor()
        assert (whole.dtype, whole.item()) == (torch.float32, 2.0)


@pytest.mark.parametrize("size", [2, 3])
def test_empty_shards_take_the_dtype_of_others(pool, size):
    pool(size, dtypes_of_empty_shards)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    embed = kind(FakeGang("cpu", rank=1, size=2), V, E)
    embed.weight.no_weight_decay = True
    model = nn.ModuleList([embed, OutputHead(embed)])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0].weight) is ShardedParameter
        assert twin[1].weight is twin[0].weight
        assert torch.equal(twin[0].weight, embed.weight)
        with pytest.raises(ValueError, match="must be given the whole table"):
            twin[0].weight.t()
    file = io.BytesIO()
    torch.save([embed.weight, embed.weight.detach(), model.state_dict()], file)
    file.seek(0)
    parameter, tensor, state = torch.load(file, weights_only=True)
    assert (type(parameter), type(tensor)) == (Parameter, torch.Tensor)
    assert parameter.no_weight_decay
    assert {type(x) for x in state.values()} == {torch.Tensor}
    assert torch.equal(state["0.weight"], local(embed.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_what_replaces_a_weight_makes_a_shard_again(kind):
    gang = FakeGang("cpu", rank=1, size=2)
    embed = kind(gang, V, E)
    state = embed.state_dict()
    for change in (
        lambda e: e.double(),
        lambda e: e.to("meta").to_empty(device="cpu"),
        lambda e: e.load_state_dict(state, assign=True),
        lambda e: setattr(e, "weight", Parameter(torch.zeros_like(e.weight))),
        lambda e: setattr(e, "weight", Parameter(e.weight.detach().clone())),
    ):
        change(embed)
        assert type(embed.weight) is ShardedParameter
        assert isinstance(embed.weight, Parameter)
    weight = embed.weight
    head = OutputHead(kind(gang, V, E))
    head.weight = weight
    assert head.weight is weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda p, foreach: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=foreach),
        lambda p, foreach: torch.optim.Adam(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.AdamW(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.AdamW(p, 0.1, fused=not foreach),
        lambda p, foreach: torch.optim.Adagrad(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.RMSprop(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.NAdam(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.RAdam(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.Adamax(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.Adadelta(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.ASGD(p, 0.1, foreach=foreach),
        lambda p, foreach: torch.optim.Rprop(p, 0.1, foreach=foreach),
    ],
)
@pytest.mark.parametrize("foreach", [True, False])
def test_optimizers_that_work_item_by_item_step_as_on_a_plain_parameter(kind, make, foreach):
    embed = kind(FakeGang("cpu", rank=1, size=2), V, E)
    other = nn.Linear(3, 2)
    twins = [Parameter(local(embed.weight).clone()), Parameter(other.weight.detach().clone())]
    ours, theirs = make([embed.weight, other.weight], foreach), make(twins, foreach)
    for step in range(3):
        for p, q in zip([embed.weight, other.weight], twins, strict=True):
            q.grad = torch.full_like(q, 0.1 * (step - 1))
            p.grad = q.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(local(embed.weight), twins[0])
    assert torch.equal(other.weight, twins[1])
    for state in ours.state[embed.weight].values():
        assert type(state) in (torch.Tensor, int, float)
