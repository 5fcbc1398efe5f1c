"""`train_rows` trains like `torch.nn.Embedding` with a hook that masks its gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from parity import SHARDED, whole
from tp_embed import FakeGang, OutputHead, StandardEmbedding, shard_embeddings
from tp_embed.lookup.train_rows import as_rows

SIZES = [1, 2, 3]
V, E = 13, 5
ROWS = [0, 4, 5, 11]
IDS = torch.tensor([[1, 5, 4, 5, 7], [0, 12, 11, 1, 5]])
MASK = torch.zeros(V, 1).index_fill_(0, torch.tensor(ROWS), 1.0)


class Plain(nn.Module):
    def __init__(self, tied=False, sparse=False):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(V, E, padding_idx=11, sparse=sparse)
        self.mix = nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def optimizer_of(model, sparse):
    if sparse:
        return torch.optim.SparseAdam([model.embed.weight], lr=0.1)
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def train(model, sparse, seen=None):
    optimizer, losses = optimizer_of(model, sparse), []
    for step in range(3):
        loss = nn.functional.cross_entropy(
            model(IDS.roll(step)).flatten(0, 1), IDS.roll(1 + step).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        if seen is not None:
            seen.append(model.embed.weight.grad)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), whole_table(model.embed)


def whole_table(embed):
    if isinstance(embed, nn.Embedding):
        return embed.weight.detach().clone()
    return whole(embed, embed.weight.detach().clone())


def expected(tied, sparse):
    model = Plain(tied, sparse)
    model.embed.weight.register_hook(
        lambda grad: (grad.to_dense() * MASK).to_sparse(1) if sparse else grad * MASK
    )
    return train(model, sparse)


def sharded(gang, strategy, tied, sparse, rows=ROWS):
    model = Plain(tied, sparse)
    shard_embeddings(model, gang, strategy=strategy, train_rows={"*embed": rows}, shard_head=False)
    gradients = []
    result = train(model, sparse, gradients)
    assert all(grad.is_sparse == sparse for grad in gradients)
    return result


# A head has a dense gradient, so the sum is dense.
@pytest.mark.parametrize(("tied", "sparse"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", SIZES)
def test_trains_as_with_a_masked_gradient(pool, size, strategy, tied, sparse):
    for result in pool(size, sharded, strategy, tied, sparse):
        torch.testing.assert_close(result, expected(tied, sparse), atol=2e-6, rtol=2e-6)


def classes(gang, kind, sparse):
    torch.manual_seed(1)
    table = StandardEmbedding(V, E, sparse=sparse, train_rows=ROWS)
    embed = table if kind is None else SHARDED[kind].from_embedding(table, gang)
    assert torch.equal(embed.train_rows, torch.tensor(ROWS))
    generator = torch.Generator().manual_seed(2)
    embed(IDS).backward(torch.randn(*IDS.shape, E, generator=generator))
    grad = embed.weight.grad
    assert grad.is_sparse == sparse
    if sparse:
        assert grad.is_coalesced()
        used = set(ROWS) & set(IDS.flatten().tolist())
        assert {i + embed.rows.start for i in grad.indices()[0].tolist()} == used & {*embed.rows}
    if kind is not None:
        assert torch.equal(embed.to_embedding().train_rows, embed.train_rows)
    return whole(embed, grad.to_dense())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [None, "embed", "vocab"])
@pytest.mark.parametrize("size", SIZES)
def test_each_class_is_exact(pool, size, kind, sparse):
    torch.manual_seed(1)
    table = StandardEmbedding(V, E)
    embed = nn.Embedding(V, E, _weight=table.weight.detach())
    embed.weight.register_hook(lambda grad: grad * MASK)
    embed(IDS).backward(torch.randn(*IDS.shape, E, generator=torch.Generator().manual_seed(2)))
    for grad in pool(size, classes, kind, sparse):
        assert torch.equal(grad, embed.weight.grad)


ALL = torch.arange(V)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (slice(10, None), ALL[10:]),
        (slice(None, None, 4), ALL[::4]),
        (range(2, 5), ALL[2:5]),
        (range(-2, 0), ALL[-2:]),
        ([12, 3, -1, 3], ALL[[3, 12]]),
        ((5,), ALL[[5]]),
        (torch.tensor([7, 2], dtype=torch.int32), ALL[[2, 7]]),
        (ALL % 2 == 1, ALL[1::2]),
        ([True] + [False] * (V - 1), ALL[:1]),
        ((ALL > 5).numpy(), ALL[6:]),
    ],
)
def test_rows_may_be_given_in_many_ways(given, rows):
    assert torch.equal(as_rows(given, V), rows)
    with torch.device("meta"):
        table = StandardEmbedding(V, E, train_rows=given)
    assert torch.equal(table.train_rows, rows)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1, 13], IndexError, r"must be in \[-13, 13\) .* but has 13"),
        ([-14], IndexError, r"has -14"),
        ([], ValueError, "at least one row.*requires_grad_"),
        (slice(20, None), ValueError, "at least one row"),
        (torch.zeros(V, dtype=torch.bool), ValueError, "at least one row"),
        (torch.ones(V - 1, dtype=torch.bool), ValueError, r"\(13,\) .* \(12,\) instead"),
        (torch.ones(V, 1, dtype=torch.bool), ValueError, r"\(13, 1\) instead"),
        ([[1], [2]], ValueError, "one-dimensional"),
        (3, ValueError, "one-dimensional"),
        ([0.5], TypeError, "torch.float32"),
        ("10:", TypeError, "`str`"),
    ],
)
def test_wrong_rows(given, error, message):
    with pytest.raises(error, match=message):
        StandardEmbedding(V, E, train_rows=given)


def trained_rows(layer, call):
    """Returns the block's rows that get a gradient if all rows are used."""
    layer.weight.grad = None
    call(layer).sum().backward()
    return layer.weight.grad.to_dense().any(1).nonzero()[:, 0].tolist()


def test_outlives_what_replaces_its_parameter():
    gang = FakeGang("cpu")
    for kind in (*SHARDED.values(), None):
        args = () if kind is None else (gang,)
        embed = (kind or StandardEmbedding)(*args, V, E, train_rows=ROWS)
        layers = [(embed, lambda layer: layer(ALL))]
        if kind is not None:
            head = OutputHead(embed)
            layers.append((head, lambda layer: layer(torch.ones(1, E).to(layer.weight.dtype))))
        for layer, call in layers:
            assert trained_rows(layer, call) == ROWS
            for other in (
                copy.deepcopy(layer),
                copy.copy(layer),
                pickle.loads(pickle.dumps(layer)),
                copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
                copy.deepcopy(layer).bfloat16().double(),
                loaded(layer),
                given_a_new_weight(layer),
                frozen_and_no_longer(layer),
            ):
                assert trained_rows(other, call) == ROWS
                assert len(other.weight._backward_hooks) == 1


def loaded(layer):
    other = copy.deepcopy(layer)
    other.load_state_dict({"weight": torch.ones(V, E)}, assign=True)
    return other


def given_a_new_weight(layer):
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(torch.ones(V, E))
    return other


def frozen_and_no_longer(layer):
    other = copy.deepcopy(layer).requires_grad_(False)
    other.weight = nn.Parameter(torch.ones(V, E), requires_grad=False)
    return copy.deepcopy(other).requires_grad_(True)


def test_all_that_share_a_weight_agree():
    one, other = StandardEmbedding(V, E, train_rows=[1]), StandardEmbedding(V, E, train_rows=[2])
    with pytest.raises(ValueError, match="1 rows from 2 to 2 and 1 rows from 1 to 1"):
        other.weight = one.weight


def test_nan_of_a_row_that_does_not_train():
    embed = StandardEmbedding(V, E, train_rows=[1])
    embed(torch.tensor([1, 2])).backward(torch.tensor([[1.0], [torch.nan]]).expand(2, E))
    assert embed.weight.grad.isfinite().all()


def test_reused_gradients():
    embed = StandardEmbedding(V, E, train_rows=ROWS, reuse_grad=True)
    for ids in (IDS, IDS.roll(1), IDS):
        embed.zero_grad()
        embed(ids).sum().backward()
        counts = torch.bincount(ids.flatten(), minlength=V)[:, None] * MASK
        assert torch.equal(embed.weight.grad, counts.expand(V, E))


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_a_head_of_its_own(strategy):
    model = Plain()
    rules = {"embed": "none", "head": strategy}
    shard_embeddings(model, FakeGang("cpu"), rules=rules, train_rows={"head": slice(3)})
    model(IDS).logsumexp(-1).sum().backward()
    assert model.head.weight.grad.any(1).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert model.embed.weight.grad.any(1).sum() > 4


def test_patterns():
    model = nn.ModuleDict({name: nn.Embedding(V, E) for name in ("a", "b", "c")})
    rows = {"[ab]": [1], "b": [2]}
    shard_embeddings(model, FakeGang("cpu"), train_rows=rows)
    assert [None if m.train_rows is None else m.train_rows.tolist() for m in model.values()] == [
        [1],
        [1],
        None,
    ]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"d": [1]}, ValueError, r"`train_rows` must match .* \['d'\] match none"),
        ({"a": [V]}, IndexError, r"'a'.*has 13"),
        ({"b": [1]}, ValueError, r"'b' must be sharded .*strategy 'none'.*register_hook"),
        ([1], TypeError, "must map names"),
    ],
)
def test_refused(rows, error, message):
    model = nn.ModuleDict({name: nn.Embedding(V, E) for name in ("a", "b")})
    with pytest.raises(error, match=message):
        shard_embeddings(model, FakeGang("cpu"), rules={"b": "none"}, train_rows=rows)
    assert all(type(module) is nn.Embedding for module in model.values())


def disagree(gang):
    model = nn.ModuleDict({"a": nn.Embedding(V, E)})
    with pytest.raises(RuntimeError, match="must agree on the rows of 'a' that train"):
        shard_embeddings(model, gang, train_rows={"a": [gang.rank]})


def test_ranks_agree(pool):
    pool(2, disagree)


def test_compiled():
    embed = StandardEmbedding(V, E, train_rows=ROWS)
    torch.compile(embed, fullgraph=True, backend="aot_eager")(ALL).sum().backward()
    assert embed.weight.grad.any(1).nonzero()[:, 0].tolist() == ROWS


@pytest.mark.parametrize("sparse", [False, True])
def test_functional_call(sparse):
    embed = StandardEmbedding(V, E, train_rows=ROWS, sparse=sparse)
    leaf = torch.ones(V, E, requires_grad=True)
    torch.func.functional_call(embed, {"weight": leaf * 2}, (ALL,)).sum().backward()
    assert leaf.grad.to_dense().eq(2).all()  # Like a hook of the Parameter, which does not see it.


def compiled(gang, kind):
    embed = SHARDED[kind](gang, V, E, train_rows=ROWS)
    torch.compile(embed, fullgraph=True, backend="aot_eager")(ALL).sum().backward()
    return whole(embed, embed.weight.grad).any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", ["embed", "vocab"])
@pytest.mark.parametrize("size", [2, 3])
def test_compiled_over_a_gang(pool, size, kind):
    assert pool(size, compiled, kind) == [ROWS] * size


def test_the_vocabulary_is_resized_first():
    sizes = {"vocab_size": V, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.resize_token_embeddings(V + 2)
    shard_embeddings(model, FakeGang("cpu"), train_rows={"*.wte": slice(V, None)})
    model(IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad.any(1).nonzero()[:, 0].tolist() == [V, V + 1]
    with pytest.raises(ValueError, match="must have no `train_rows` when the vocabulary"):
        model.resize_token_embeddings(V + 4)
    assert model.get_input_embeddings().num_embeddings == V + 2
