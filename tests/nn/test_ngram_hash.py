"""Compares rows of n-grams with the published formulas, in plain Python, and with transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from tp_embed import NGramCache, RollingHash, XorHash

V, EOS = 41, 7


def draw(*shape, high=V, seed=0):
    """Ids that end a document one time in five."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(high, shape, generator=generator)
    return ids.masked_fill(torch.rand(shape, generator=generator) < 0.2, EOS)


def qwen(ngram_size=3, heads=2, base=50, layer=0, seed=1234):
    """The module of transformers, whose table says the number of the row, and the same hash."""
    config = Qwen4ExpTextConfig(
        vocab_size=V,
        eos_token_id=EOS,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
        ple_layer_ids=[1, 2],
        ple_embed_dim=(ngram_size - 1) * heads,
        ngram_size=ngram_size,
        heads_per_ngram=heads,
        ngram_vocab_size_base=base,
        seed=seed,
    )
    theirs = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, 0, layer)
    with torch.no_grad():
        table = theirs.ngram_embedding.weight
        table.copy_(torch.arange(len(table)).unsqueeze(1))
    ours = XorHash(V, base, max_ngram=ngram_size, heads=heads, layer=layer, seed=seed, boundary=EOS)
    return config, theirs, ours


QWENS = [
    {},
    {"ngram_size": 2, "heads": 3},
    {"ngram_size": 4, "heads": 1, "base": 2},
    {"base": 1000, "layer": 1, "seed": 5},
]


@pytest.mark.parametrize("options", QWENS, ids=str)
def test_rows_equal_those_of_transformers(options):
    _, theirs, ours = qwen(**options)
    sizes = [size for heads in ours.sizes for size in heads]
    assert sizes == theirs.head_vocab_sizes
    assert list(ours.multipliers) == theirs.layer_multipliers.tolist()
    for shape in [(3, 40), (2, 1), (1, 2), (4, 0)]:
        ids = draw(*shape)
        if ids.numel():
            assert torch.equal(ours.rows(ids), theirs(ids, None).long())
        assert ours.rows(ids.int()).shape == (*shape, ours.num_heads)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_steps_equal_those_of_transformers(first):
    config, theirs, ours = qwen()
    ids, past, cache = draw(2, 9), DynamicCache(config=config), NGramCache()
    for part in ids.split([first, *[1] * (9 - first)], dim=1):
        assert torch.equal(ours.rows(part, cache), theirs(part, past).long())


def engram_rows(ids, sizes, multipliers, fill):
    """The formula of Engram, in NumPy's wrapping int64."""
    found = []
    for i in range(len(ids)):
        window = [ids[i - k] if i >= k else fill for k in range(len(multipliers))]
        row, first = [], 0
        for n, heads in enumerate(sizes, start=2):
            mixed = np.int64(0)
            for token, multiplier in zip(window[:n], multipliers, strict=False):
                mixed ^= np.int64(token) * np.int64(multiplier)
            for size in heads:
                row.append(int(mixed % np.int64(size)) + first)
                first += size
        found.append(row)
    return torch.tensor(found)


def test_rows_of_engram():
    """Multipliers of NumPy, another size for each n, distinct primes in all layers, and documents
    that run into each other."""
    bound = np.iinfo(np.int64).max // V // 2
    for layer, sizes in enumerate([((11, 13), (17, 19), (23, 29)), ((31, 37), (41, 43), (47, 53))]):
        drawn = np.random.default_rng(10007 * layer).integers(0, bound, size=4) * 2 + 1
        ours = XorHash(
            V, [10, 14, 20], max_ngram=4, heads=2, layer=layer, multipliers=drawn, fill=3
        )
        assert ours.sizes == sizes
        for ids in draw(3, 12):
            expected = engram_rows(ids.tolist(), sizes, drawn.tolist(), fill=3)
            assert torch.equal(ours.rows(ids), expected)


def longcat_rows(ids, base, max_ngram, heads):
    """The formula of LongCat-Flash-Lite in integers of any size."""
    found = []
    for i in range(len(ids)):
        start = max((j + 1 for j in range(i) if ids[j] == EOS), default=0)
        row, first = [], 0
        for n in range(2, max_ngram + 1):
            tokens = [ids[i - k] for k in range(n) if i - k >= start]
            polynomial = sum(token * V**k for k, token in enumerate(tokens))
            for _ in range(heads):
                size = base + 2 * len(row) + 1
                row.append(polynomial % size + first)
                first += size
        found.append(row)
    return torch.tensor(found)


@pytest.mark.parametrize(("max_ngram", "heads"), [(2, 1), (3, 2), (4, 4)])
@pytest.mark.parametrize("base", [2 * V, 1 << 30])
def test_rows_of_longcat(max_ngram, heads, base):
    ours = RollingHash(V, base, max_ngram=max_ngram, heads=heads, boundary=EOS)
    for ids in draw(4, 30):
        assert torch.equal(ours.rows(ids), longcat_rows(ids.tolist(), base, max_ngram, heads))


HASHES = [
    XorHash(V, 50, heads=2, boundary=EOS),
    XorHash(V, 50, max_ngram=4, heads=1, fill=0),
    RollingHash(V, 60, heads=2, boundary=EOS),
    RollingHash(V, 60, max_ngram=2, heads=3),
]


@pytest.mark.parametrize("hashing", HASHES, ids=str)
def test_steps_equal_the_whole(hashing):
    ids = draw(2, 12)
    whole = hashing.rows(ids)
    for parts in [[1] * 12, [5, 0, 1, 6], [12, 0], [2, 2, 8]]:
        cache = NGramCache()
        steps = [hashing.rows(part, cache) for part in ids.split(parts, dim=1)]
        assert torch.equal(torch.cat(steps, dim=1), whole)
        assert cache.ids.shape == (2, hashing.max_ngram - 1)


@pytest.mark.parametrize("hashing", HASHES, ids=str)
def test_packed_documents_equal_each_alone(hashing):
    """Also if they are packed a part at a time."""
    lengths = [4, 1, 7, 2]
    ids = draw(14, seed=1)
    positions = torch.cat([torch.arange(length) for length in lengths])
    alone = torch.cat([hashing.rows(part) for part in ids.split(lengths)])
    assert torch.equal(hashing.rows(ids, positions=positions.int()), alone)
    cache = NGramCache()
    steps = [
        hashing.rows(part, cache, place)
        for part, place in zip(ids.split(3), positions.split(3), strict=True)
    ]
    assert torch.equal(torch.cat(steps), alone)


def test_ids_out_of_range_have_no_row():
    hashing = HASHES[0]
    ids = draw(2, 6)
    expected = hashing.rows(ids)
    ids[0, 3], ids[1, 5] = V, -1
    rows = hashing.rows(ids)
    assert (rows[0, 3] == -1).all()
    assert (rows[1, 5] == -1).all()
    assert torch.equal(rows[1, :5], expected[1, :5])


def test_sizes_of_the_published_model():
    """Qwen4-Exp: 20 million rows for each of 16 heads."""
    hashing = XorHash(248320, 20_000_000, boundary=248044)
    assert hashing.num_heads == 16
    assert all(size >= 20_000_000 for heads in hashing.sizes for size in heads)
    assert str(hashing) == f"XorHash(248320, {hashing.num_rows} rows, boundary=248044)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: XorHash(V, 50), r"`fill` must be given without a `boundary`"),
        (lambda: XorHash(V, 50, boundary=V), r"`boundary` must be a token id in \[0, 41\)"),
        (lambda: XorHash(V, 50, fill=-1), r"`fill` must be a token id"),
        (lambda: XorHash(V, 50, fill=0, heads=0), r"`sizes` must have at least one head"),
        (lambda: XorHash(V, 50, fill=0, max_ngram=1), r"Use `max_ngram` of 2 or more"),
        (lambda: XorHash(V, 0, fill=0), r"`base_size` must be a positive number"),
        (lambda: XorHash(V, [50], fill=0), r"or 2 of them, one for each n up to 3"),
        (lambda: XorHash(V, 50, fill=0, multipliers=[1]), r"`multipliers` must have 3 numbers"),
        (lambda: RollingHash(V, -1, heads=2), r"each with at least one row"),
        (lambda: RollingHash(V, 1 << 56), r"`base_size` must be so small that hashes fit"),
        (lambda: RollingHash(V, 50, heads=0), r"`sizes` must have at least one head"),
        (lambda: RollingHash(V, 50, max_ngram=1), r"`sizes` must have at least one head"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ids_must_be_integers():
    with pytest.raises(TypeError, match="must have an integer dtype"):
        HASHES[0].rows(torch.rand(3))
