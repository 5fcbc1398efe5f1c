"""Attributes and hooks of a replaced table carry over to the shard, or are refused by name."""

from __future__ import annotations

import copy
import enum
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from parity import whole
from tp_embed import FakeGang, OutputHead, StandardEmbedding, shard_embeddings, shardwise

SIZES = [1, 2, 3]
MIDDLE = FakeGang("cpu", rank=1, size=3)
V, E = 7, 4
IDS = torch.tensor([[0, 6, 3], [3, 5, 1]])


class Model(nn.Module):
    def __init__(self, kind=nn.Embedding, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = kind(V, E), nn.Linear(E, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def scale(value, factor):
    return value * factor


class Hooks:
    def __init__(self):
        self.seen = 0

    @shardwise
    def method(self, grad):
        self.seen += 1
        return grad.clamp(-0.05, 0.05)

    def count(self, parameter):
        self.seen += 1
        parameter.grad.mul_(3.0)


def with_hooks(model):
    hooks, weight = Hooks(), model.embed.weight
    weight.register_hook(hooks.method)
    weight.register_hook(shardwise(functools.partial(scale, factor=2.0)))
    weight.register_post_accumulate_grad_hook(shardwise(hooks.count))
    return hooks, weight.register_hook(shardwise(lambda grad: grad + 1.0))


def gradients(model, hooks, handle, cut=lambda grad: grad):
    found = []
    for removes in (False, True):
        if removes:
            handle.remove()
        model.zero_grad()
        model(IDS).logsumexp(-1).sum().backward()
        found.append(cut(model.embed.weight.grad.clone()))
    assert hooks.seen == 4
    return found


def marked_hooks(gang, strategy, tied):
    model = Model(tied=tied)
    of_model = with_hooks(model)
    shard_embeddings(model, gang, strategy=strategy, shard_head=False)
    return gradients(model, *of_model, lambda grad: whole(model.embed, grad))  # type: ignore[call-arg]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", SIZES)
def test_marked_hooks_go_over(pool, size, strategy, tied):
    model = Model(tied=tied)
    expected = gradients(model, *with_hooks(model))
    for result in pool(size, marked_hooks, strategy, tied):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_a_gang_of_one_takes_every_hook_and_attribute(strategy):
    model, mask = Model(), torch.zeros(V, 1).index_fill_(0, torch.tensor([2, 3]), 1.0)
    model.embed.weight.register_hook(lambda grad: grad * mask)
    model.embed.weight.mask = mask
    shard_embeddings(model, FakeGang("cpu"), strategy=strategy)
    model(IDS).logsumexp(-1).sum().backward()
    assert model.embed.weight.grad.any(1).nonzero()[:, 0].tolist() == [2, 3]
    assert model.embed.weight.mask is mask


def hook(grad):
    return grad * torch.ones(V, 1)


@pytest.mark.parametrize("place", ["embed", "head"])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_for_the_whole_table_are_refused(register, place):
    model = Model()
    getattr(getattr(model, place).weight, register)(hook)
    modules = dict(model.named_modules())
    message = rf"'embed' must have no hook .* has `test_carry.hook` by `{register}`.*`train_rows`"
    for strategy in ("embed", "vocab"):
        with pytest.raises(ValueError, match=message):
            shard_embeddings(model, MIDDLE, strategy=strategy)
    assert dict(model.named_modules()) == modules
    shard_embeddings(model, MIDDLE, strategy="none")


def test_a_table_that_is_left_whole_keeps_its_hooks():
    model = Model()
    model.embed.weight.register_hook(lambda grad: grad * 0)
    shard_embeddings(model, MIDDLE, tie_head=False)
    model(IDS).sum().backward()  # It does not raise either.
    assert not model.embed.weight.grad.any()


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_hooks_of_ours_and_of_modules_are_no_reason(strategy):
    model = nn.ModuleDict({"ours": StandardEmbedding(V, E, sparse=True, train_rows=[1, 5])})
    model["ours"].register_forward_hook(lambda m, ids, output: output.requires_grad_(True))
    model["ours"](IDS).sum().backward()  # Leaves a hook on the weight.
    model["ours"].zero_grad()
    shard_embeddings(model, FakeGang("cpu"), strategy=strategy)
    model["ours"](IDS).sum().backward()
    grad = model["ours"].weight.grad
    assert grad.is_coalesced()
    assert grad.indices()[0].tolist() == [1, 5]
    assert len(model["ours"].weight._backward_hooks) == 1
    assert len(model["ours"].weight._post_accumulate_grad_hooks) == 1


class Kind(enum.Enum):
    TABLE = 1


PLAIN = {
    "no_weight_decay": True,
    "is_embedding_or_output_parameter": True,
    "sequence_parallel": False,
    "lr_scale": 0.1,
    "label": "embed",
    "kind": Kind.TABLE,
    "betas": (0.9, 0.95),
    "options": {"group": ["a", None]},
    "master_dtype": torch.float32,
    "step": torch.tensor(3),
}


@pytest.mark.parametrize("gang", [FakeGang("cpu"), MIDDLE])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_attributes_of_the_parameter_go_over(strategy, gang):
    model = Model()
    vars(model.embed.weight).update(PLAIN)
    shard_embeddings(model, gang, strategy=strategy)
    for key, value in PLAIN.items():
        assert getattr(model.embed.weight, key) is value
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("value", [torch.ones(V, 1), [torch.ones(3)], hook, object()])
def test_other_attributes_of_the_parameter_are_refused(value):
    model = Model()
    model.embed.weight.extra = value
    with pytest.raises(ValueError, match=r"'embed' must have plain values .* `extra` is a"):
        shard_embeddings(model, MIDDLE)


def test_attributes_that_a_shard_has_itself_are_refused():
    model = Model()
    model.embed.weight.gang = "a"
    with pytest.raises(ValueError, match=r"no attribute `gang`, .* but has 'a'"):
        shard_embeddings(model, MIDDLE)


def test_marks_of_megatron_are_set_anew():
    for strategy, dim in (("vocab", 0), ("embed", 1)):
        model = Model()
        weight = model.embed.weight
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = False, -1, 1
        shard_embeddings(model, MIDDLE, strategy=strategy)
        weight = model.embed.weight
        assert (weight.tensor_model_parallel, weight.partition_dim) == (True, dim)


def old_gradient(gang, strategy, sparse):
    model = Model(lambda v, e: nn.Embedding(v, e, sparse=sparse), tied=False)
    model(IDS).logsumexp(-1).sum().backward()
    expected = model.embed.weight.grad.to_dense()
    shard_embeddings(model, gang, strategy=strategy, shard_head=False)
    grad = model.embed.weight.grad
    assert grad.is_sparse == sparse
    assert torch.equal(whole(model.embed, grad.to_dense()), expected)
    model(IDS).logsumexp(-1).sum().backward()
    result = whole(model.embed, model.embed.weight.grad.to_dense())
    torch.testing.assert_close(result, 2 * expected)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", SIZES)
def test_a_gradient_goes_over(pool, size, strategy, sparse):
    pool(size, old_gradient, strategy, sparse)


class Named(nn.Embedding):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.label, self.config = "words", {"tied": True}

    def extra_repr(self):
        return self.label


class Projection(nn.Linear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.label = "logits"


def visible(module):
    """Returns users' attributes: neither state nor torch's own."""
    internal = vars(nn.Module()).keys()
    buffers = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
    return {k: v for k, v in vars(module).items() if k not in internal} | buffers


@pytest.mark.parametrize("gang", [FakeGang("cpu"), MIDDLE])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_attributes_of_modules_go_over(strategy, gang):
    tables = {
        "plain": nn.Embedding(V, E),
        "padded": nn.Embedding(V, E, padding_idx=-1, sparse=True),
        "named": Named(V, E, padding_idx=2),
        "gemma": Gemma3TextScaledWordEmbedding(V, E, 1, embed_scale=2.5),
        "bart": BartScaledWordEmbedding(V, E, 1, embed_scale=2.5),
        "buffer": nn.Embedding(V, E),
        "head": Projection(E, V),
    }
    tables["buffer"].register_buffer("counts", torch.ones(3), persistent=False)
    tables["plain"]._is_hf_initialized = True
    model = nn.ModuleDict(tables)
    shard_embeddings(model, gang, strategy=strategy, rules={"head": strategy})
    for name, new in model.items():
        for key, value in visible(tables[name]).items():
            if key != "forward":  # It raises.
                found = getattr(new, key)
                same = torch.equal(found, value) if torch.is_tensor(value) else found == value
                assert same, (name, key)
    assert isinstance(model["head"], OutputHead)
    assert "counts" not in model["buffer"].state_dict()


@pytest.mark.parametrize("kind", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_a_scale_that_is_changed_counts(kind):
    model = nn.ModuleList([kind(V, E, 1, embed_scale=2.0)])
    shard_embeddings(model, FakeGang("cpu"))
    once = model[0](IDS)
    model[0].embed_scale = 6.0
    torch.testing.assert_close(model[0](IDS), 3.0 * once)


def test_names_of_torch_cannot_be_set():
    table = StandardEmbedding(V, E)
    for name in ("max_norm", "scale_grad_by_freq", "padding_idx", "embedding_dim"):
        with pytest.raises(AttributeError):
            setattr(table, name, 1)
    assert not hasattr(table, "embed_scale")


@pytest.mark.parametrize("gang", [FakeGang("cpu"), MIDDLE])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_a_replaced_module_raises_when_it_is_called(strategy, gang):
    model = Model()
    kept, other = [model.embed, model.head], nn.Sequential(model.embed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    shard_embeddings(model, gang, strategy=strategy)
    message = rf"`Embedding` must not be called.*`{type(model.embed).__name__}`.* 'embed' of the"
    for old in (kept[0], other, copy.deepcopy(kept[0]), pickle.loads(pickle.dumps(kept[0]))):
        with pytest.raises(ValueError, match=message):
            old(IDS)
    with pytest.raises(ValueError, match=r"`Linear` must not be called.*`OutputHead`.*'head'"):
        kept[1](torch.ones(E))
    assert torch.equal(kept[0].state_dict()["weight"], state["embed.weight"])
    assert torch.equal(optimizer.param_groups[0]["params"][0], state["embed.weight"])
    assert kept[0].weight.requires_grad


def test_a_compiled_module_raises_too():
    model = Model()
    old = model.embed
    old.compile(backend="eager")
    old(IDS)
    shard_embeddings(model, FakeGang("cpu"))
    with pytest.raises(ValueError, match="must not be called"):
        old(IDS)


COMPUTED = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_computed_weights_are_refused(strategy, how):
    model = Model(tied=False)
    COMPUTED[how](model.embed)
    with pytest.raises(ValueError, match="'embed' must hold its `weight` as a Parameter"):
        shard_embeddings(model, MIDDLE, strategy=strategy)


def test_pruning_that_is_made_permanent():
    model = Model(tied=False)
    prune.l1_unstructured(model.embed, "weight", 0.5)
    prune.remove(model.embed, "weight")
    expected = model.embed(IDS)
    shard_embeddings(model, FakeGang("cpu"))
    assert torch.equal(model.embed(IDS), expected)


def test_a_table_on_meta_with_hooks():
    with torch.device("meta"):
        model = Model()
    model.embed.weight.register_hook(shardwise(lambda grad: grad * 2))
    shard_embeddings(model, FakeGang("cpu"), strategy="vocab")
    assert model.embed.weight.is_meta
    assert len(model.embed.weight._backward_hooks) == 1
