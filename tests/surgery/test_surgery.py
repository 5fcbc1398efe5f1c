"""Models whose tables are replaced compute what they did."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from parity import assert_same_bits
from surgery_models import (
    IDS,
    MIDDLE,
    SIZES,
    Tower,
    assert_refused,
    build,
    seen,
    seen_sharded,
    tied_llama,
)
from tp_embed import (
    FakeGang,
    OutputHead,
    Partition,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
    shard_embeddings,
)
from tp_embed.gang.collectives import copy_to_gang, gather_columns
from tp_embed.nn import init

# The model, the arguments, and the strategy of each table.
CASES = {
    "llama by default": ("llama", {}, {"lm_head": "vocab", "model.embed_tokens": "embed"}),
    "llama without its head": (
        "llama",
        {"shard_head": False},
        {"model.embed_tokens": "embed"},
    ),
    "llama by rows": (
        "llama",
        {"strategy": "vocab", "shard_head": False},
        {"model.embed_tokens": "vocab"},
    ),
    "tied llama by default": ("tied llama", {}, {"model.embed_tokens": "vocab"}),
    "tied llama by columns": ("tied llama", {"strategy": "embed"}, {"model.embed_tokens": "embed"}),
    "gpt2 by default": ("gpt2", {}, {"transformer.wte": "vocab", "transformer.wpe": "embed"}),
    "gpt2 by rules": (
        "gpt2",
        {"rules": {"*.wpe": "none"}},
        {"transformer.wte": "vocab", "transformer.wpe": "none"},
    ),
    "llama with its head by a rule": (
        "llama",
        {"strategy": "none", "rules": {"lm_head": "auto"}},
        {"lm_head": "vocab", "model.embed_tokens": "none"},
    ),
    "llama without its head by a rule": (
        "llama",
        {"rules": {"lm_head": "none"}},
        {"lm_head": "none", "model.embed_tokens": "embed"},
    ),
    "tied tables left whole": (
        "gpt2",
        {"tie_head": False},
        {"transformer.wte": "none", "transformer.wpe": "embed"},
    ),
    "tower by default": ("tower", {}, {"source": "vocab", "kinds.0": "embed"}),
    "tower by rules": (
        "tower",
        {"strategy": "none", "rules": {"*.1": "vocab", "source": "embed", "*": "embed"}},
        {"source": "embed", "kinds.0": "vocab"},
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_sharded_model_computes_what_it_did(pool, case, size):
    name, options, strategies = CASES[case]
    logits, gradients = seen(build(name))
    for result in pool(size, seen_sharded, name, options, timeout=120):
        assert result[2] == strategies
        assert list(result[1]) == list(gradients)
        if name == "llama" and "lm_head" not in strategies:
            assert_same_bits(result[0], logits, "logits")
            for key, gradient in gradients.items():
                assert_same_bits(result[1][key], gradient, f"gradients of {key}")
        else:
            torch.testing.assert_close(result[0], logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(result[1], gradients, atol=1e-5, rtol=1e-5)


def test_report():
    report = shard_embeddings(Tower(), MIDDLE, rules={"kinds.1": "embed"})
    source, kinds = report.tables
    assert (source.name, source.tied, source.strategy) == ("source", ("target", "head"), "vocab")
    assert (kinds.name, kinds.tied, kinds.strategy) == ("kinds.0", ("kinds.1",), "embed")
    assert (source.num_embeddings, source.embed_dim) == (103, 10)
    assert (source.bytes_per_rank, source.bytes_replicated) == (35 * 10 * 4, 103 * 10 * 4)
    assert (kinds.bytes_per_rank, kinds.bytes_replicated) == (7 * 4 * 4, 7 * 10 * 4)
    assert report.bytes_per_rank == source.bytes_per_rank + kinds.bytes_per_rank
    assert report.bytes_replicated == source.bytes_replicated + kinds.bytes_replicated
    table = nn.ModuleList([nn.Embedding(1 << 20, 1 << 10, device="meta", dtype=torch.bfloat16)])
    assert str(shard_embeddings(table, FakeGang("cpu", rank=3, size=4))) == (
        "0 (1048576 x 1024): strategy 'embed'; 512.00 MiB on this rank, 2048.00 MiB if replicated\n"
        "saves 1536.00 of 2048.00 MiB on this rank, and the same share of gradients, master copies "
        "and optimizer states"
    )
    assert str(report).startswith("source (103 x 10): strategy 'vocab', tied to target, head; ")
    assert len(str(report).splitlines()) == 3


def test_nothing_to_shard():
    assert str(shard_embeddings(nn.Linear(3, 3), MIDDLE)) == "no embedding tables"
    tower = Tower()
    shard_embeddings(tower, MIDDLE)
    modules = dict(tower.named_modules())
    assert shard_embeddings(tower, MIDDLE).tables == ()
    assert dict(tower.named_modules()) == modules


def test_what_was_one_stays_one():
    tower = Tower().eval()
    shard_embeddings(tower, MIDDLE)
    assert not any(module.training for module in tower.modules())
    assert tower.kinds[0] is tower.kinds[1]
    assert isinstance(tower.kinds[0], ShardedEmbedding)
    assert tower.source is not tower.target
    assert (tower.source.pad_idx, tower.target.pad_idx) == (3, None)
    assert tower.source.weight is tower.target.weight is tower.head.weight
    assert isinstance(tower.head, OutputHead)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_what_a_table_was_stays(strategy):
    model = nn.ModuleDict(
        {
            "frozen": nn.Embedding(5, 4).requires_grad_(False),
            "low": nn.Embedding(5, 4, padding_idx=-1, dtype=torch.bfloat16),
            "sparse": nn.Embedding(5, 4, sparse=True).eval(),
            "ours": StandardEmbedding(5, 4, pad_idx=2, dtype=torch.float64),
            "on meta": nn.Embedding(1 << 30, 1 << 20, device="meta"),
        }
    )
    was = copy.deepcopy(model)
    shard_embeddings(model, FakeGang("cpu"), strategy=strategy)
    for name, embed in model.items():
        assert isinstance(embed, (ShardedEmbedding, VocabShardedEmbedding))
        assert embed.weight.requires_grad == (name != "frozen")
        assert embed.weight.dtype == was[name].weight.dtype
        assert embed.weight.device == was[name].weight.device
        assert embed.sparse == (name == "sparse")
        assert embed.training == (name != "sparse")
        assert embed.pad_idx == {"low": 4, "ours": 2}.get(name)
        if name != "on meta":
            assert_same_bits(embed.weight, was[name].weight, name)


def test_hooks_of_tables_and_heads_stay():
    tower, calls = Tower(), []
    tower.source.register_forward_pre_hook(lambda *args: calls.append("in"), with_kwargs=True)
    handle = tower.source.register_forward_hook(lambda m, x, y: calls.append(type(m)))
    tower.head.register_forward_hook(lambda m, x, y: calls.append(type(m)))
    tower.head.register_full_backward_hook(lambda m, x, y: calls.append("back"))
    shard_embeddings(tower, FakeGang("cpu"))
    tower(IDS).sum().backward()
    assert calls == ["in", VocabShardedEmbedding, OutputHead, "back"]
    handle.remove()
    tower(IDS)
    assert calls[4:] == ["in", OutputHead]


def initialised(gang, strategy):
    torch.manual_seed(gang.rank)  # Rank 0 has the last word.
    model = Tower()
    shard_embeddings(model, gang, strategy=strategy, init_fn=init.scaled)
    return [
        (e.to_embedding() if hasattr(e, "to_embedding") else e).weight.detach()
        for e in (model.source, model.target, model.kinds[0])
    ]


@pytest.mark.parametrize("size", SIZES)
def test_init_fn_gives_the_same_tables_for_each_strategy(pool, size):
    source, target, kinds = initialised(FakeGang("cpu"), "auto")
    assert_same_bits(source, target, "tables")
    assert not source[3].any()
    for strategy in ("auto", "embed", "vocab", "none"):
        for tables in pool(size, initialised, strategy):
            for table, expected in zip(tables, (source, target, kinds), strict=True):
                assert_same_bits(table, expected, f"tables of '{strategy}'")


@pytest.mark.parametrize("name", ["source", "target"])
def test_table_with_the_rule_none_is_left_where_its_tied_table_is_not(name):
    tower = Tower()
    table = getattr(tower, name)
    with contextlib.suppress(ValueError):
        shard_embeddings(tower, MIDDLE, rules={name: "none"})
    assert getattr(tower, name) is table
    assert tower.source.weight is tower.target.weight is tower.head.weight


def test_options_of_the_embeddings():
    model = build("llama")
    shard_embeddings(model, MIDDLE, sparse=True, output="shard")
    embed = model.get_input_embeddings()
    assert (embed.sparse, embed.output) == (True, "shard")
    assert_refused(tied_llama(), ValueError, "`output` must be one of", output="shard")
    model = build("llama")
    shard_embeddings(model, MIDDLE, reuse_grad=True, dedup=False, output="sequence")
    embed = model.get_input_embeddings()
    assert (embed.reuse_grad, embed.dedup, embed.output) == (True, False, "sequence")
    assert_refused(build("llama"), ValueError, "`dedup` must be 'auto'", dedup="on")


def test_kind_of_gradient_is_what_it_was_or_what_is_asked_for():
    def kinds(**options):
        model = nn.ModuleDict(
            {
                "dense": nn.Embedding(7, 6),
                "sparse": nn.Embedding(7, 6, sparse=True),
                "reused": StandardEmbedding(7, 6, reuse_grad=True, init_fn=init.zeros),
            }
        )
        shard_embeddings(model, MIDDLE, **options)
        assert model["reused"].init_fn is (options.get("init_fn") or init.zeros)
        return [(table.sparse, table.reuse_grad) for table in model.values()]

    for init_fn in (None, init.normal):
        assert kinds(init_fn=init_fn) == [(False, False), (True, False), (False, True)]
        assert kinds(init_fn=init_fn, sparse=False, reuse_grad=True) == 3 * [(False, True)]
        assert kinds(init_fn=init_fn, sparse=True, reuse_grad=False) == 3 * [(True, False)]
    for options in ({"sparse": True, "reuse_grad": True}, {"sparse": True}, {"reuse_grad": True}):
        model = nn.Module()
        model.good = nn.Embedding(7, 6)
        model.bad = StandardEmbedding(
            7, 6, sparse="sparse" not in options, reuse_grad="sparse" in options
        )
        assert_refused(model, ValueError, "`reuse_grad` must be False with `sparse`", **options)


class SequenceTower(Tower):
    """The same, written for tables of which each rank gets a part of the positions."""

    gang = None

    def forward(self, ids):
        first, second = self.kinds
        x = self.source(ids) + self.target(ids.flip(1)) + first(ids % 7) * second(ids % 5)
        x = torch.tanh(linear_of_part(self.mix, x, self.gang))
        return self.head(gather_sequence(x, ids.size(1), self.gang))


def linear_of_part(linear, x, gang):
    """A layer of which each rank sees a part of the positions: its gradients are added up."""
    weight, bias = copy_to_gang(linear.weight, gang), copy_to_gang(linear.bias, gang)
    return nn.functional.linear(x, weight, bias)


def gather_sequence(x, length, gang):
    return gather_columns(x.mT.contiguous(), gang, Partition(length, gang.size)).mT


def run_sequence_tower(gang, strategy):
    torch.manual_seed(0)
    model = SequenceTower()
    model.gang = gang
    shard_embeddings(model, gang, strategy=strategy, output="sequence")
    return seen(model)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [2, 3])
def test_tied_tables_with_sequence_output(pool, strategy, size):
    """The table gets the gradients of all positions, those of the head included."""
    expected = seen(build("tower"))
    for logits, gradients in pool(size, run_sequence_tower, strategy):
        torch.testing.assert_close(logits, expected[0])
        torch.testing.assert_close(gradients, expected[1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scaled_table(device):
    with torch.device(device):
        table = Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5)
    model = nn.Sequential(table)
    shard_embeddings(model, MIDDLE)
    assert float(model[0].scale) == 2.5
    with pytest.raises(ValueError, match=r"`scale` must be a number or a tensor of the shape \(\)"):
        StandardEmbedding(3, 2, scale=torch.ones(2))
