"""Compares n-gram embeddings, over gangs of any size, with transformers' own in one process, and
with plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from tp_embed import (
    FakeGang,
    NGramAverage,
    NGramCache,
    NGramEmbedding,
    NGramGate,
    RollingHash,
    XorHash,
    shard_embeddings,
)
from tp_embed.lookup.gradient import as_sparse
from tp_embed.optim import RowwiseAdagrad
from tp_embed.parameter.sharded import local

V, EOS, HIDDEN, STREAMS, HEADS, WIDTH = 41, 7, 8, 2, 2, 3
STRATEGIES = ["embed", "vocab", "world"]


def config():
    return Qwen4ExpTextConfig(
        vocab_size=V,
        hidden_size=HIDDEN,
        eos_token_id=EOS,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
        ple_layer_ids=[1, 2],
        ple_embed_dim=2 * HEADS * WIDTH,
        heads_per_ngram=HEADS,
        ngram_vocab_size_base=30,
        hc_count=STREAMS,
    )


def theirs(layer=0):
    """The layer of transformers with random weights, in the convolution too."""
    torch.manual_seed(0)
    made = Qwen4ExpTextPLELayer(config(), 0, layer)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def hash_of(layer=0):
    return XorHash(V, 30, heads=HEADS, layer=layer, boundary=EOS)


def gate(layer=0):
    """The same layer of ours, whole."""
    their = theirs(layer)
    ngrams = NGramEmbedding(hash_of(layer), WIDTH, pad_to_multiple_of=128)
    made = NGramGate(ngrams, HIDDEN, streams=STREAMS)
    made.load_state_dict(
        {
            "ngrams.table.weight": their.ple_embedding.ngram_embedding.weight,
            "key.weight": their.key_proj.weight,
            "value.weight": their.value_proj.weight,
            "conv.weight": their.conv1d.weight,
            **{
                f"{name}.weight": 1 + getattr(their, name).weight.view(STREAMS, HIDDEN)
                for name in ("norm_key", "norm_query", "norm_conv")
            },
        }
    )
    return made


def batch(rank, length=9):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(V, (2, length), generator=generator)
    ids[:, 3] = EOS
    x = torch.randn(2, length, STREAMS * HIDDEN, generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :2] = False  # Padding on the left.
    return ids, x, mask, torch.randn(x.shape, generator=generator)


def sharded_gate(gang, strategy):
    made = gate()
    cut = NGramEmbedding(hash_of(), WIDTH, gang, strategy=strategy, pad_to_multiple_of=128)
    kind: Any = type(cut.table)
    cut.table = kind.from_embedding(made.ngrams.table, gang)
    made.ngrams = cut
    return made


def run_gate(gang, strategy):
    rank = gang.rank if strategy == "world" else 0
    ids, x, mask, grad = batch(rank)
    made = sharded_gate(gang, strategy)
    x.requires_grad_()
    made(x, ids, mask=mask).backward(grad)
    table = made.ngrams.table
    grads = {n: p.grad for n, p in made.named_parameters() if not n.startswith("ngrams")}
    with torch.no_grad():
        return {
            "output": made(x, ids, mask=mask),
            "plain": made(x, ids),
            "embedded": made.ngrams(ids),
            "x": x.grad,
            "table": local(table.weight.grad),
            "rows": list(table.rows),
            "columns": list(table.columns),
            **grads,
        }


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_the_layer_of_transformers(pool, size, strategy):
    """Outputs and gradients, with padding and without; with the strategy "world" each rank has a
    batch of its own."""
    results = pool(size, run_gate, strategy)
    their = theirs()
    for rank, found in enumerate(results):
        ids, x, mask, grad = batch(rank if strategy == "world" else 0)
        x.requires_grad_()
        alone = theirs()
        output = x + alone(x, torch.where(mask, ids, EOS), None, conv_mask=mask)
        output.backward(grad)
        close(found["output"], output)
        close(found["plain"], x + alone(x, ids, None))
        assert torch.equal(found["embedded"], alone.ple_embedding(ids, None))
        close(found["x"], x.grad)
        close(found["key.weight"], alone.key_proj.weight.grad)
        close(found["value.weight"], alone.value_proj.weight.grad)
        close(found["conv.weight"], alone.conv1d.weight.grad)
        for name in ("norm_key", "norm_query", "norm_conv"):
            close(found[f"{name}.weight"].flatten(), getattr(alone, name).weight.grad)
        if strategy == "world" or not rank:
            table = their.ple_embedding.ngram_embedding.weight
            added = alone.ple_embedding.ngram_embedding.weight.grad
            table.grad = added if table.grad is None else table.grad + added
    whole = torch.full_like(table, torch.nan)
    for found in results:
        rows, columns = (
            torch.tensor(found[name], dtype=torch.long) for name in ("rows", "columns")
        )
        whole[rows.unsqueeze(1), columns] = found["table"]
    close(whole, table.grad)


def test_steps_equal_those_of_transformers():
    ids, x, _, _ = batch(0)
    cache, past = NGramCache(), DynamicCache(config=config())
    their, made = theirs(), gate()
    with torch.no_grad():
        whole = made(x, ids)
        steps = []
        for at in [slice(0, 4), *[slice(i, i + 1) for i in range(4, 9)]]:
            steps.append(made(x[:, at], ids[:, at], cache))
            close(steps[-1], x[:, at] + their(x[:, at], ids[:, at], past))
    close(torch.cat(steps, dim=1), whole)


def test_layers_have_hashes_of_their_own():
    ids, x, _, _ = batch(0)
    close(gate(1)(x, ids), x + theirs(1)(x, ids, None))
    assert not torch.equal(hash_of(0).rows(ids), hash_of(1).rows(ids))


class LongCat(nn.Module):
    """LongCat-Flash-Lite's embedding of n-grams, by its formula: a table and a matrix for each
    head, and the mean with the embeddings of tokens."""

    def __init__(self, hashing):
        super().__init__()
        sizes = [size for heads in hashing.sizes for size in heads]
        self.hashing = hashing
        self.word = nn.Embedding(V, HIDDEN)
        self.tables = nn.ModuleList([nn.Embedding(size, WIDTH) for size in sizes])
        self.projections = nn.ModuleList([nn.Linear(WIDTH, HIDDEN, bias=False) for _ in sizes])

    def forward(self, ids):
        rows, total, first = self.hashing.rows(ids), self.word(ids), 0
        for head, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            total = total + projection(table(rows[..., head] - first))
            first += table.num_embeddings
        return total / (1 + len(self.tables))


def longcat():
    torch.manual_seed(1)
    return LongCat(RollingHash(V, 2 * V, max_ngram=3, heads=HEADS, boundary=EOS))


class Averaging(nn.Module):
    """The same by our modules."""

    def __init__(self, **options):
        super().__init__()
        alone = longcat()
        self.word = alone.word
        self.ngram = NGramAverage(NGramEmbedding(alone.hashing, WIDTH, **options), HIDDEN)
        with torch.no_grad():
            table, projection = self.ngram.ngrams.table, self.ngram.projection
            table.weight.copy_(torch.cat([table.weight for table in alone.tables]))
            projection.weight.copy_(torch.cat([p.weight for p in alone.projections], dim=1))

    def forward(self, ids, cache=None):
        return self.ngram(self.word(ids), ids, cache)


def train_average(gang, strategy, steps=3):
    """Trains a model whose tables are sharded by `shard_embeddings`."""
    model = Averaging(sparse=True)
    rules = {"word": "none", "*ngram*": strategy}
    if gang.size > 1 or strategy == "world":
        shard_embeddings(model, gang, rules=rules, world=gang)
    table = model.ngram.ngrams.table
    optimizer = RowwiseAdagrad([table.weight], lr=0.1)
    outputs = []
    for step in range(steps):
        ids = batch(10 * step + (gang.rank if strategy == "world" else 0))[0]
        outputs.append(model(ids))
        table.weight.grad = None
        outputs[-1].square().sum().backward()
        optimizer.step()
    whole = table.to_embedding().weight if hasattr(table, "to_embedding") else table.weight
    cache = NGramCache()
    with torch.no_grad():
        decoded = torch.cat([model(part, cache) for part in ids.split(2, dim=1)], dim=1)
        again = model(ids)
    return {
        "outputs": [output.detach() for output in outputs],
        "table": whole.detach(),
        "decoded": decoded,
        "again": again,
        "kind": type(table).__name__,
    }


KINDS = dict(
    zip(
        STRATEGIES,
        ["ShardedEmbedding", "VocabShardedEmbedding", "RowWiseEmbedding"],
        strict=True,
    )
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_average_trains_as_by_the_formula(pool, size, strategy):
    results = pool(size, train_average, strategy)
    alone = longcat()
    table = nn.Parameter(torch.cat([t.weight.detach() for t in alone.tables]))
    optimizer = RowwiseAdagrad([table], lr=0.1)
    ranks = range(size if strategy == "world" else 1)
    for step in range(3):
        ids = torch.cat([batch(10 * step + rank)[0] for rank in ranks])
        alone.zero_grad()
        output = alone(ids)
        output.square().sum().backward()
        for rank, found in enumerate(results):
            expected = output.split(2)[rank if strategy == "world" else 0]
            close(found["outputs"][step], expected)
        grad = torch.cat([t.weight.grad for t in alone.tables])
        used = grad.abs().sum(dim=1).nonzero()[:, 0]
        optimizer.step(grads={table: as_sparse(used, grad[used], len(grad))})
        with torch.no_grad():
            sizes = [t.num_embeddings for t in alone.tables]
            for own, part in zip(alone.tables, table.split(sizes), strict=True):
                own.weight.copy_(part)
    for found in results:
        close(found["table"], table)
        close(found["decoded"], found["again"])
        assert (size == 1 and strategy != "world") or found["kind"] == KINDS[strategy]


def look_up_bad_ids(gang, strategy):
    made = NGramEmbedding(hash_of(), WIDTH, gang, strategy=strategy)
    ids = batch(0)[0]
    if strategy != "world" or gang.rank == gang.size - 1:
        ids[1, 4] = V  # On one rank alone, where ranks have ids of their own.
    try:
        made(ids)
    except IndexError as e:
        return str(e)
    return "nothing"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ids_out_of_range_raise_on_all_ranks(pool, size, strategy):
    for message in pool(size, look_up_bad_ids, strategy):
        assert "All token ids must be in [0, 41) (`vocab_size` of the hash)" in message
        assert "the id at position (1, 4, 0) is -1" in message


def build(gang, strategy):
    """A table that is built sharded, with options of its class."""
    torch.manual_seed(3)
    made = NGramEmbedding(hash_of(), WIDTH, gang, strategy=strategy, sparse=True, dedup=False)
    assert made.table.sparse
    assert not made.table.dedup
    return made.table.to_embedding().weight.detach()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_initial_values_are_the_same_at_every_size(pool, strategy):
    torch.manual_seed(3)
    expected = NGramEmbedding(hash_of(), WIDTH, sparse=True).table.weight
    for size in (1, 2, 3):
        for found in pool(size, build, strategy):
            assert torch.equal(found, expected)


def test_copies_move_and_change_dtype():
    made = gate()
    copied = copy.deepcopy(made).to(torch.bfloat16)
    ids, x, _, _ = batch(0)
    assert copied(x.bfloat16(), ids).dtype == torch.bfloat16
    assert made(x[0], ids[0]).shape == x[0].shape
    close(made(x[0], ids[0]), made(x, ids)[0])


def test_engram_has_biases_and_one_stream():
    """DeepSeek's code for one stream, by its formula."""
    hashing = XorHash(V, 30, heads=HEADS, fill=0)
    torch.manual_seed(0)
    made = NGramGate(NGramEmbedding(hashing, WIDTH), HIDDEN, bias=True, kernel_size=3)
    nn.init.normal_(made.conv.weight)
    ids, x, _, _ = batch(0)
    x = x[..., :HIDDEN]
    found = made.ngrams(ids)
    norm = nn.RMSNorm(HIDDEN, eps=1e-6)
    products = (norm(made.key(found)) * norm(x)).sum(dim=-1) / HIDDEN**0.5
    gates = (products.abs().clamp_min(1e-6).sqrt() * products.sign()).sigmoid()
    value = gates.unsqueeze(-1) * made.value(found)
    conv = nn.Conv1d(HIDDEN, HIDDEN, 3, groups=HIDDEN, bias=False, padding=6, dilation=3)
    conv.weight = made.conv.weight
    short = nn.functional.silu(conv(norm(value).transpose(1, 2))[..., :9]).transpose(1, 2)
    close(made(x, ids), x + value + short)


@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (0, 0)])
def test_no_tokens(shape):
    """A rank without ids runs the same layers, whose gradients are zero."""
    layer = gate()
    x = torch.zeros(*shape, STREAMS * HIDDEN, requires_grad=True)
    found = layer(x, torch.zeros(*shape, dtype=torch.long))
    assert found.shape == x.shape
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.conv.parameters())


def test_refused():
    with pytest.raises(ValueError, match=r"`strategy` must be one of \('embed', 'vocab', 'world"):
        NGramEmbedding(hash_of(), WIDTH, FakeGang("cpu"), strategy="none")
    made = NGramEmbedding(hash_of(), WIDTH, FakeGang("cpu"), strategy="embed", output="sequence")
    with pytest.raises(ValueError, match=r"`output` must be 'replicated' for the table of an"):
        made(batch(0)[0])
    ids, x, mask, _ = batch(0)
    whole = NGramEmbedding(XorHash(V, 30, fill=0), WIDTH)
    with pytest.raises(ValueError, match=r"`mask` must be left out without a `boundary`"):
        NGramGate(whole, HIDDEN, streams=STREAMS)(x, ids, mask=mask)
    assert "XorHash(41, " in repr(whole)
