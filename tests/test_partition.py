from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_embed import Partition
from tp_embed.partition import as_slice, auto_strategy, describe, within


@given(size=st.integers(0, 300), num_shards=st.integers(1, 40))
def test_shards_cover_every_item_once_and_in_order(size, num_shards):
    partition = Partition(size, num_shards)
    shards = [partition.shard(rank) for rank in range(num_shards)]

    assert [item for shard in shards for item in shard] == list(range(size))
    assert partition.sizes == tuple(len(shard) for shard in shards)
    assert max(partition.sizes) == partition.block


@given(size=st.integers(0, 300), num_shards=st.integers(1, 40))
def test_cyclic_shards_cover_every_item_once_and_evenly(size, num_shards):
    partition = Partition(size, num_shards, cyclic=True)
    shards = [partition.shard(rank) for rank in range(num_shards)]

    assert sorted(item for shard in shards for item in shard) == list(range(size))
    assert max(partition.sizes) == partition.block
    assert max(partition.sizes) - min(partition.sizes) <= 1


@given(size=st.integers(1, 300), num_shards=st.integers(1, 40), cyclic=st.booleans())
def test_positions_are_the_rank_and_the_index_in_its_shard(size, num_shards, cyclic):
    partition = Partition(size, num_shards, cyclic)
    for rank in range(num_shards):
        for index, item in enumerate(partition.shard(rank)):
            assert partition.position(item) == rank * partition.block + index
    items = torch.arange(size)
    assert partition.position(items).tolist() == [partition.position(i) for i in range(size)]


@given(
    start=st.integers(0, 20),
    stop=st.integers(0, 60),
    step=st.integers(1, 7),
    part=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_slices_of_items(start, stop, step, part):
    items, (first, last), whole = range(start, stop, step), sorted(part), list(range(60))
    assert whole[as_slice(items)] == list(items)
    found = items[within(items, first, last)]
    assert list(found) == [item for item in items if first <= item < last]
    assert whole[first:last][as_slice(found, first)] == list(found)


def test_descriptions_of_items():
    assert [describe(range(2, 5)), describe(range(1, 9, 3))] == ["2:5", "1:9:3"]


@given(size=st.integers(1, 300), num_shards=st.integers(1, 40))
def test_cut_is_that_of_torch_chunk(size, num_shards):
    sizes = Partition(size, num_shards).sizes
    assert [n for n in sizes if n] == [len(c) for c in torch.arange(size).chunk(num_shards)]


def test_more_shards_than_items_leaves_empty_ones():
    assert Partition(3, 5).sizes == (1, 1, 1, 0, 0)
    assert Partition(0, 2).sizes == (0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Partition(-1, 2), "`size` must be greater than or equal to 0, but is -1"),
        (lambda: Partition(4, 0), "`num_shards` must be greater than or equal to 1, but is 0"),
        (lambda: Partition(4, 2).shard(2), r"`rank` must be in \[0, 2\), but is 2 instead"),
        (lambda: Partition(4, 2).shard(-1), r"`rank` must be in \[0, 2\), but is -1 instead"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    num_shards=st.integers(1, 40),
    tied=st.booleans(),
)
def test_auto_takes_no_shards_that_are_larger_by_more_than_a_tenth(sizes, num_shards, tied):
    rows, columns = (Partition(size, num_shards).block for size in sizes)
    shards = {"vocab": rows * sizes[1], "embed": sizes[0] * columns}
    found = auto_strategy(*sizes, num_shards, tied=tied)
    assert shards[found] <= 1.1 * min(shards.values())
    if max(shards.values()) <= 1.1 * min(shards.values()):
        assert found == ("vocab" if tied else "embed")
