"""Ranks that are about to do different things are all told so, before anything is done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tp_embed import GangError, StandardEmbedding, init, shard_embeddings


def shard_differently(gang, what):
    """Rank 1 differs from the others in one thing."""
    odd = gang.rank == 1
    torch.manual_seed(int(odd and what == "seed"))
    model = nn.Sequential(nn.Embedding(12 if odd and what == "size" else 11, 6))
    if odd and what == "dtype":
        model = model.bfloat16()
    options = {"strategy": "vocab"} if odd and what == "strategy" else {"strategy": "embed"}
    if odd and what == "class":
        model[0] = StandardEmbedding(11, 6)
    if odd and what == "init":
        options["init_fn"] = init.normal
    with pytest.raises(GangError) as error:
        shard_embeddings(model, gang, **options)
    assert isinstance(model[0], (nn.Embedding, StandardEmbedding))
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("strategy", "the strategy for '0', but disagree: rank 0: 'embed', rank 1: 'vocab', rank"),
        ("size", "the shape of '0', but disagree: rank 0: (11, 6), rank 1: (12, 6), rank 2: (11,"),
        ("dtype", "the dtype of '0', but disagree: rank 0: torch.float32, rank 1: torch.bfloat16"),
        ("seed", "the values of '0' (a checksum), but disagree: rank 0: '"),
        ("class", "the classes at '0', but disagree: rank 0: ['Embedding'], rank 1: ['Standard"),
        ("init", "whether there is an `init_fn`, but disagree: rank 0: False, rank 1: True"),
    ],
)
def test_all_ranks_are_told(pool, what, message):
    for found in pool(3, shard_differently, what):
        assert message in found
        assert found.endswith("with torch seeded alike.")


def shard_from_init(gang):
    """Ranks may have different values where all are drawn anew."""
    torch.manual_seed(gang.rank)
    shard_embeddings(nn.Sequential(nn.Embedding(11, 6)), gang, init_fn=init.normal)


def test_values_do_not_matter_where_they_are_replaced(pool):
    pool(2, shard_from_init)


def fail_alone(gang, what):
    """Rank 1 has something that cannot be sharded."""
    odd = gang.rank == 1
    torch.manual_seed(0)
    options = {"max_norm": 1.0} if odd and what == "table" else {}
    model = nn.Sequential(nn.Embedding(11, 6, **options))
    strategy = "vocabb" if odd and what == "argument" else "vocab"
    with pytest.raises((GangError, ValueError)) as error:
        shard_embeddings(model, gang, strategy=strategy)
    assert type(model[0]) is nn.Embedding
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize(
    ("what", "message"), [("argument", "`strategy` must be one of"), ("table", "use `max_norm`")]
)
def test_error_of_one_rank_ends_all(pool, what, message):
    found = pool(3, fail_alone, what)
    assert [kind for kind, _ in found] == ["GangError", "ValueError", "GangError"]
    for rank in (0, 2):
        assert "Rank 1 of ProcessGroupGang(" in found[rank][1]
    assert all(message in text for _, text in found)
