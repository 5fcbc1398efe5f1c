"""What users do with the logits of a rank's classes: it keeps them marked, or is refused."""

from __future__ import annotations

import pickle

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from tp_embed import FakeGang, OutputHead, VocabShardedEmbedding
from tp_embed.nn.local_logits import LocalLogits
from tp_embed.nn.loss import cross_entropy

V, E = 8, 6
# (rank, size): with 4 and 3 classes, as many as there are tokens in a row or a column.
RANKS = [(0, 2), (1, 3)]
TARGET = torch.tensor([[0, 1, 2]] * 4)
POSITIONS = torch.tensor([0, 2])
EVERY_OTHER = torch.tensor([True, False, True, False])
REFUSAL = "must be given the logits of all classes"


def local_logits(rank, size):
    torch.manual_seed(0)
    embed = VocabShardedEmbedding(FakeGang("cpu", rank=rank, size=size), V, E)
    return OutputHead(embed, output="shard")(torch.randn(4, 3, E))


@pytest.fixture(params=RANKS, ids=str)
def logits(request):
    return local_logits(*request.param)


KEPT = {
    # Several tensors.
    "chunk": lambda y: y.chunk(2),
    "split": lambda y: torch.split(y, 3),
    "split_with_sizes": lambda y: y.split([1, 2], dim=1),
    "tensor_split": lambda y: y.tensor_split(2, dim=1),
    "unbind": lambda y: y.unbind(),
    "iteration": lambda y: list(y),
    "unpacking": lambda y: (lambda a, b, c, d: (a, d))(*y),
    "cat": lambda y: torch.cat([y, y], dim=-2),
    "cat with others": lambda y: torch.cat([y.as_subclass(torch.Tensor), y]),
    "stack": lambda y: torch.stack([y[0], y[1]]),
    "stack before the classes": lambda y: torch.stack([y, y], dim=-2),
    "pad_sequence": lambda y: pad_sequence([y[0], y[1, :1]], batch_first=True),
    "max": lambda y: y.max(1),
    "sort of tokens": lambda y: y.cummax(dim=0),
    # Keywords.
    "input=": lambda y: torch.mul(input=y, other=2.0),
    "tensors=": lambda y: torch.cat(tensors=[y, y]),
    "dim=": lambda y: torch.sum(input=y, dim=0, keepdim=True),
    "second operand": lambda y: torch.ones(4, 3, 1) - y,
    # Dimensions of tokens.
    "transpose": lambda y: y.transpose(0, 1),
    "swapaxes": lambda y: torch.swapaxes(y, 0, -2),
    "movedim": lambda y: y.movedim(1, 0),
    "permute": lambda y: y.permute(1, 0, 2),
    "permute of a tuple": lambda y: torch.permute(y, (1, 0, -1)),
    "flatten": lambda y: y.flatten(0, 1),
    "view": lambda y: y.view(-1, y.shape[-1]),
    "reshape": lambda y: y.reshape(2, 6, y.shape[-1]),
    "unflatten": lambda y: y.unflatten(0, (2, 2)),
    "unsqueeze": lambda y: y.unsqueeze(-2).squeeze(-2).unsqueeze(0),
    "expand": lambda y: y[:, None].expand(-1, 2, -1, -1),
    "repeat": lambda y: y.repeat(2, 1, 1),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 0),
    "flip": lambda y: y.flip(0, 1),
    "roll": lambda y: y.roll(1, 0),
    "mean": lambda y: y.mean((0, 1)),
    "std": lambda y: y.std(dim=1),
    "pad": lambda y: functional.pad(y, (0, 0, 0, 1)),
    # Indices of tokens.
    "shift": lambda y: y[..., :-1, :],
    "row": lambda y: y[1],
    "rows": lambda y: y[[0, 2]],
    "mask": lambda y: y[EVERY_OTHER],
    "mask of tokens": lambda y: y[TARGET > 0],
    "positions": lambda y: y[torch.arange(2), POSITIONS],
    "new dimension": lambda y: y[:, :, None],
    "new dimension after the tokens": lambda y: y[..., None, :],
    "index_select": lambda y: y.index_select(1, POSITIONS),
    "narrow": lambda y: y.narrow(1, 0, 2),
    "select": lambda y: y.select(-2, 0),
    "gather": lambda y: y.gather(1, POSITIONS[None, :, None].expand(4, 2, y.shape[-1])),
    # Values.
    "soft cap": lambda y: torch.tanh(y / 30) * 30,
    "operators": lambda y: -((1 - y) ** 2) / 2 + 2 * y % 3,
    "in place": lambda y: y.clone().sub_(1).masked_fill_(y < 0, -1.0),
    "augmented": lambda y: y.clone().__imul__(2.0),
    "casts": lambda y: y.double().to(torch.bfloat16).float().type(torch.float64),
    "comparison": lambda y: (y > 0) & ~(y == 1),
    "where": lambda y: torch.where(y > 0, y, 0.0),
    "masked_fill": lambda y: y.masked_fill(y < 0, -1e9),
    "clamp": lambda y: y.clamp(min=-1.0, max=1.0),
    "exp": lambda y: (y - y.detach()).exp().log(),
    "copies": lambda y: y.clone().contiguous().detach().data.cpu(),
    "checkpoint": lambda y: checkpoint(lambda z: z * 2, y, use_reentrant=False),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_treats_classes_alike_keeps_the_kind_and_the_values(logits, name):
    found = KEPT[name](logits)
    expected = KEPT[name](logits.as_subclass(torch.Tensor))
    found, expected = map(_pytree.tree_leaves, (found, expected))
    assert len(found) == len(expected)
    for kept, plain in zip(found, expected, strict=True):
        assert type(kept) is LocalLogits
        torch.testing.assert_close(kept.as_subclass(torch.Tensor), plain, rtol=0, atol=0)
        with pytest.raises(ValueError, match=f"`softmax` {REFUSAL}"):
            kept.softmax(-1)


REFUSED = {
    # The classes elsewhere.
    "transpose": lambda y: y.transpose(1, 2),
    "cross_entropy of (B, V, S)": lambda y: functional.cross_entropy(y.transpose(1, 2), TARGET),
    "swapdims": lambda y: torch.swapdims(y, dim0=-1, dim1=0),
    "movedim": lambda y: y.movedim(-1, 0),
    "permute": lambda y: y.permute(0, 2, 1),
    "mT": lambda y: y.mT,
    "view": lambda y: y.view(-1),
    "ravel": lambda y: y.ravel(),
    "flatten": lambda y: y.flatten(1),
    "unsqueeze": lambda y: y.unsqueeze(-1),
    "stack after the classes": lambda y: torch.stack([y, y], dim=-1),
    "cat of classes": lambda y: torch.cat([y, y], -1),
    "cat of one token": lambda y: torch.cat([y[0, 0], y[0, 1]]),
    "chunk of classes": lambda y: y.chunk(2, dim=-1),
    "unbind of classes": lambda y: y[0, 0].unbind(),
    "iteration over classes": lambda y: list(y[0, 0]),
    "flip": lambda y: y.flip(-1),
    "roll": lambda y: y.roll(1, 2),
    "roll of all": lambda y: y.roll(1),
    "pad": lambda y: functional.pad(y, (0, 1)),
    "repeat": lambda y: y.repeat(1, 1, 2),
    "diagonal": lambda y: y.diagonal(),
    # Some classes.
    "new dimension": lambda y: y[..., None],
    "new dimension at the end": lambda y: y[:, :, :, None],
    "class": lambda y: y[..., 0],
    "class of a token": lambda y: y[0, 0, 0],
    "classes of a token": lambda y: y[0, 0][:2],
    "last class": lambda y: y[:, :, -1:],
    "classes of targets": lambda y: y.flatten(0, 1)[torch.arange(12), TARGET.flatten()],
    "mask of values": lambda y: y[y > 0],
    "list as a mask": lambda y: y[0][[[True] * y.shape[-1]] + [[False] * y.shape[-1]] * 2],
    "gather": lambda y: y.gather(-1, TARGET[..., None]),
    "take_along_dim": lambda y: y.take_along_dim(TARGET[..., None], -1),
    "index_select": lambda y: y.index_select(-1, torch.tensor([0])),
    "select": lambda y: y.select(2, 0),
    "narrow": lambda y: torch.narrow(y, -1, 0, 1),
    "masked_select": lambda y: y.masked_select(y > 0),
    "where": lambda y: torch.where(y > 0),
    "setting a class": lambda y: y.clone().__setitem__((..., 0), -torch.inf),
    "one class of a token": lambda y: y[0, 0].clone().__setitem__(0, 1.0),
    "index_fill": lambda y: y.index_fill(-1, torch.tensor([0]), -torch.inf),
    "scatter": lambda y: y.scatter(-1, TARGET[..., None], 0.0),
    # Plain tensors that would hold them.
    "writing": lambda y: torch.empty(4, 3, y.shape[-1]).__setitem__(slice(None), y),
    "copy_": lambda y: torch.empty(4, 3, y.shape[-1]).copy_(y),
    "add_": lambda y: torch.zeros(4, 3, y.shape[-1]).add_(y),
    "out=": lambda y: torch.mul(y, 2, out=torch.empty(4, 3, y.shape[-1])),
    "numpy": lambda y: y.numpy(),
    "asarray": lambda y: numpy.asarray(y),
    "tolist": lambda y: y[0].tolist(),
    "dlpack": lambda y: torch.from_dlpack(y),
    "data_ptr": lambda y: y.data_ptr(),
    # Reductions.
    "softmax": lambda y: functional.softmax(y, -1),
    "softmax by a module": lambda y: nn.Softmax(-1)(y),
    "special.softmax": lambda y: torch.special.softmax(y, -1),
    "special.log_softmax": lambda y: torch.special.log_softmax(y, -1),
    "special.logsumexp": lambda y: torch.special.logsumexp(y, -1),
    "logsumexp": lambda y: torch.logsumexp(y, -1),
    "softmax by hand": lambda y: (y - y.amax(-1, True)).exp(),
    "normalized by hand": lambda y: y.exp() / y.exp().sum(-1, keepdim=True),
    "operator": lambda y: torch.ops.aten._softmax(y, -1, False),
    "argmax": lambda y: y.argmax(-1),
    "max": lambda y: y.max(-1),
    "max of all": lambda y: y.max(),
    "aminmax": lambda y: y.aminmax(dim=-1),
    "topk": lambda y: y.topk(1),
    "sort": lambda y: y.sort(),
    "cumsum": lambda y: y.cumsum(-1),
    "mean": lambda y: y.mean(-1),
    "mean of all": lambda y: y.mean(),
    "nanmean": lambda y: y.nanmean(-1),
    "var_mean": lambda y: torch.var_mean(y, -1),
    "std_mean": lambda y: torch.std_mean(y, -1),
    "std": lambda y: y.std(),
    "prod": lambda y: y.prod(-1),
    "norm": lambda y: y.norm(dim=-1),
    "vector_norm": lambda y: torch.linalg.vector_norm(y, dim=-1),
    "equal": lambda y: torch.equal(y, y),
    "item": lambda y: y[:1, :1].view(-1, y.shape[-1]).item(),
    "count_nonzero": lambda y: y.count_nonzero(),
    "unique": lambda y: y.unique(),
    "matmul": lambda y: y @ torch.ones(y.shape[-1], 2),
    "linear": lambda y: functional.linear(y, torch.ones(2, y.shape[-1])),
    "einsum": lambda y: torch.einsum("bsv,bsv->bs", y, y),
    "vmap": lambda y: torch.vmap(lambda row: row.softmax(-1))(y),
    # Losses.
    "cross_entropy": lambda y: functional.cross_entropy(y.flatten(0, 1), TARGET.flatten()),
    "nll_loss": lambda y: nn.NLLLoss()(y[0], TARGET[0]),
    "multi_margin_loss": lambda y: functional.multi_margin_loss(y[0], TARGET[0]),
    "binary_cross_entropy": lambda y: functional.binary_cross_entropy_with_logits(
        y, torch.ones(4, 3, y.shape[-1])
    ),
    "cosine_similarity": lambda y: functional.cosine_similarity(y, y, -1),
    "cosine_embedding_loss": lambda y: functional.cosine_embedding_loss(y[0], y[0], torch.ones(3)),
    "mse_loss": lambda y: functional.mse_loss(y, torch.ones(4, 3, y.shape[-1])),
    "kl_div": lambda y: functional.kl_div(y, torch.ones(4, 3, y.shape[-1])),
    "margin of DPO": lambda y: y[:, :-1].chunk(2)[0].log_softmax(-1),
    # Values of all classes.
    "bias": lambda y: y + torch.ones(V),
    "mask of all classes": lambda y: y.masked_fill(torch.ones(V, dtype=torch.bool), 0.0),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REFUSED)
def test_what_tells_classes_apart_is_refused(logits, name):
    with pytest.raises(ValueError, match=REFUSAL):
        REFUSED[name](logits)


@pytest.mark.parametrize("name", sorted({*KEPT} - {"cat with others"}))
def test_one_rank_has_plain_logits(name):
    for found in _pytree.tree_leaves(KEPT[name](local_logits(0, 1))):
        assert type(found) is torch.Tensor


def test_no_and_one_class(logits):
    for classes in (0, 1):
        few = torch.randn(4, 3, classes).as_subclass(LocalLogits)
        for name in ("shift", "chunk", "flatten", "stack", "transpose", "soft cap", "mask"):
            for kept in _pytree.tree_leaves(KEPT[name](few)):
                assert type(kept) is LocalLogits
        for name in ("transpose", "unsqueeze", "softmax", "class", "bias", "gather"):
            with pytest.raises(ValueError, match=REFUSAL):
                REFUSED[name](few)


def test_values_may_be_set_by_a_mask_and_by_tokens(logits):
    expected = logits.as_subclass(torch.Tensor).clone()
    expected[expected < 0] = -1.0
    expected[0] = 2.0
    logits[logits < 0] = -1.0
    logits[0] = 2.0
    assert torch.equal(logits.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("name", ["sum", "amax", "amin", "any", "all"])
def test_sums_over_classes_warn(logits, name):
    plain = logits.as_subclass(torch.Tensor)
    for dim in (-1, (0, 2)):
        with pytest.warns(UserWarning, match=f"`{name}` is of this rank's classes only") as seen:
            found = getattr(logits, name)(dim)
        assert seen[0].filename == __file__
        assert type(found) is torch.Tensor
        assert torch.equal(found, getattr(plain, name)(dim))


def test_values_can_be_compared_in_tests(logits):
    plain = logits.as_subclass(torch.Tensor)
    with pytest.warns(UserWarning, match="`all` is of this rank's classes only"):
        torch.testing.assert_close(logits, plain)


def test_facts_and_new_tensors_are_plain(logits):
    assert logits.shape == (4, 3, logits.size(-1))
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    assert len(logits) == 4
    assert type(logits.new_zeros(2, logits.shape[-1])) is torch.Tensor
    assert type(torch.empty_like(logits)) is LocalLogits
    assert "LocalLogits" in repr(logits)


def test_copies_of_processes_and_trees_keep_the_kind(logits):
    tree = _pytree.tree_map(lambda x: x, {"logits": (logits, 1)})
    for kept in (tree["logits"][0], pickle.loads(pickle.dumps(logits.detach()))):
        assert type(kept) is LocalLogits
        assert torch.equal(kept.as_subclass(torch.Tensor), logits.as_subclass(torch.Tensor))


def test_hooks_of_modules_keep_the_kind():
    embed = VocabShardedEmbedding(FakeGang("cpu", rank=1, size=3), V, E)
    head = OutputHead(embed, output="shard")
    head.register_full_backward_hook(lambda *args: None)
    x = torch.randn(4, E, requires_grad=True)
    logits = head(x)
    assert type(logits) is LocalLogits
    logits.retain_grad()
    (gradient,) = torch.autograd.grad(logits, x, torch.ones_like(logits), retain_graph=True)
    logits.backward(torch.ones(logits.shape))
    assert type(x.grad) is type(gradient) is torch.Tensor
    assert type(logits.grad) is LocalLogits


@pytest.mark.parametrize(("rank", "size"), RANKS)
def test_transforms_check_what_is_done_inside(rank, size):
    embed = VocabShardedEmbedding(FakeGang("cpu", rank=rank, size=size), V, E)
    head = OutputHead(embed, output="shard")
    x = torch.randn(4, E)

    def squares(x):
        return head(x).mul(2).as_subclass(torch.Tensor).square().sum()

    for transform in (torch.vmap, torch.func.grad):
        transform(squares)(x)
        with pytest.raises(ValueError, match=f"`softmax` {REFUSAL}"):
            transform(lambda x: head(x).softmax(-1).square().sum())(x)


def softmax_of(head, x):
    return (head(x) * 2).softmax(-1)


def loss_of(head, x):
    return cross_entropy(head(x).float() * 2, TARGET, head.gang, head.partition)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_compiled_functions_check_them_too(pool, size):
    pool(size, compiled_functions)


def compiled_functions(gang):
    torch.compiler.reset()  # Ranks of the pool have other graphs in their caches.
    torch.manual_seed(0)
    embed = VocabShardedEmbedding(gang, V, E)
    head, x = OutputHead(embed, output="shard"), torch.randn(4, 3, E)
    if gang.size > 1:  # First, before there are graphs in the cache.
        with pytest.raises(Exception, match="Leave out `fullgraph=True`"):
            torch.compile(loss_of, backend="aot_eager", fullgraph=True)(head, x)
    compiled = torch.compile(loss_of, backend="aot_eager")
    torch.testing.assert_close(compiled(head, x), loss_of(head, x))
    doubled = torch.compile(lambda y: y * 2, backend="aot_eager")
    assert type(doubled(head(x))) is type(head(x))
    normalized = torch.compile(softmax_of, backend="aot_eager")
    if gang.size == 1:
        torch.testing.assert_close(normalized(head, x), softmax_of(head, x))
        return
    with pytest.raises(ValueError, match=f"`softmax` {REFUSAL}"):
        normalized(head, x)
