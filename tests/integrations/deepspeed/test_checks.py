"""Checks of a plan against the DeepSpeed config, without an engine."""

from __future__ import annotations

import re

import pytest
from torch import nn

from tp_embed import FakeGang, ShardedEmbedding, VocabShardedEmbedding
from tp_embed.integrations.deepspeed.checks import check_empty_shards
from tp_embed.surgery.options import ShardingOptions
from tp_embed.surgery.plan import plan_sharding


class Model(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, dim)
        self.head = nn.Linear(dim, rows, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def check(rows, dim, size, stage=3, **options):
    """Runs the check on every rank of a gang of ``size``, and returns the errors."""
    errors = []
    for rank in range(size):
        model, gang = Model(rows, dim), FakeGang("cpu", rank=rank, size=size)
        choices = plan_sharding(model, gang, ShardingOptions(**options)).choices
        try:
            check_empty_shards(model, gang, {"zero_optimization": {"stage": stage}}, choices)
        except ValueError as e:
            errors.append(str(e))
    return errors


@pytest.mark.parametrize(
    ("strategy", "rows", "dim", "size", "sizes", "other"),
    [
        ("vocab", 1, 4, 2, "[1, 0] rows", "embed"),
        ("vocab", 4, 4, 3, "[2, 2, 0] rows", None),
        ("embed", 9, 4, 3, "[2, 2, 0] columns", "vocab"),
        ("embed", 1, 1, 2, "[1, 0] columns", None),
    ],
)
def test_empty_shards_are_refused_at_zero3(strategy, rows, dim, size, sizes, other):
    options = {"strategy": strategy, "shard_head": False}
    errors = check(rows, dim, size, **options)
    assert len(errors) == size
    assert len(set(errors)) == 1
    [error] = {*errors}
    assert f"The table 'embed' must have a {sizes.split()[-1][:-1]} on each of {size} " in error
    assert f"its shards have {sizes} instead" in error
    assert '`"tp_embed": {"rules": {"embed": "none"}}`' in error
    assert re.findall(r"shard it with '(\w+)'", error) == ([] if other is None else [other])
    for stage in (0, 1, 2):
        assert not check(rows, dim, size, stage, **options)
    assert not check(rows, dim, size, **options, rules={"embed": "none"})
    assert not check(rows, dim, 1, **options)
    if other is not None:
        assert not check(rows, dim, size, **options, rules={"embed": other})


def test_empty_shards_of_an_output_head_are_refused_at_zero3():
    [error] = {*check(1, 4, 2, strategy="embed")}
    assert "The table 'head' must have a row on each of 2 tensor-parallel ranks" in error
    assert '{"rules": {"head": "none"}}' in error
    assert "shard it with" not in error
    assert not check(2, 4, 2, strategy="embed")


@pytest.mark.parametrize("kind", [ShardedEmbedding, VocabShardedEmbedding])
def test_empty_shards_of_a_sharded_layer_are_refused_at_zero3(kind):
    def run(size: int, stage: int) -> None:
        gang = FakeGang("cpu", size=size)
        model = nn.Sequential(kind(gang, 2, 2))
        check_empty_shards(model, gang, {"zero_optimization": {"stage": stage}}, [])

    with pytest.raises(ValueError, match=r"The table '0' must .* fewer ranks\."):
        run(3, 3)
    run(3, 2)
    run(2, 3)
