from __future__ import annotations

import itertools

import pytest
import torch

from tp_embed import FakeGang, Partition
from tp_embed.gang.redistribute import redistribute
from tp_embed.partition import as_slice

SIZES = [0, 1, 3, 10, 13]
CUTS = [False, True]


def moved(gang):
    table = torch.arange(2 * max(SIZES)).view(-1, 2)
    for sizes in itertools.product(SIZES, SIZES):
        for cyclic in itertools.product(CUTS, CUTS):
            old, new = (Partition(s, gang.size, c) for s, c in zip(sizes, cyclic, strict=True))
            block = table[as_slice(old.shard(gang.rank))]
            found = redistribute(block, old, new, gang)
            kept = [row for row in new.shard(gang.rank) if row < old.size]
            assert torch.equal(found, table[kept]), (old, new)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_moves_rows_between_blocks_and_cyclic_shards_of_any_sizes(pool, size):
    pool(size, moved)


def test_one_process():
    moved(FakeGang("cpu"))
