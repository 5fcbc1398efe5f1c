"""Compares the distinct ids of a batch with `torch.unique`."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_embed.lookup.distinct import find_distinct

ID_LISTS = st.lists(st.integers(0, 20), max_size=60)


@given(ids=ID_LISTS, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_they_are_those_of_torch(ids, dtype):
    ids = torch.tensor(ids, dtype=dtype)
    distinct = find_distinct(ids)
    expected, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
    assert torch.equal(distinct.ids, expected)
    assert torch.equal(distinct.inverse(), inverse)
    ends = torch.cat([distinct.starts, torch.tensor([len(ids)])])
    assert torch.equal(ends.diff(), counts)


def places(distinct):
    """Returns the places of each id, in order."""
    parts = distinct.order.tensor_split(distinct.starts[1:])
    return {
        int(i): part.tolist() for i, part in zip(distinct.ids, parts, strict=len(distinct.ids) > 0)
    }


@given(ids=ID_LISTS, data=st.data())
def test_places_are_ordered_by_their_positions(ids, data):
    positions = data.draw(st.permutations(range(len(ids))))
    found = places(find_distinct(torch.tensor(ids, dtype=torch.int64), torch.tensor(positions)))
    assert found == {
        i: sorted((p for p in range(len(ids)) if ids[p] == i), key=lambda p: positions[p])
        for i in set(ids)
    }


@given(ids=ID_LISTS, start=st.integers(0, 21), length=st.integers(0, 21), row=st.integers(0, 20))
def test_a_range_of_them_and_all_but_one(ids, start, length, row):
    distinct = find_distinct(torch.tensor(ids, dtype=torch.int64))
    rows = range(start, start + length)
    every = places(distinct)
    assert places(distinct.within(rows)) == {i: every[i] for i in every if i in rows}
    assert places(distinct.without(row)) == {i: every[i] for i in every if i != row}
    assert distinct.counts([0, start, 30]) == [
        sum(i < start for i in every),
        sum(i >= start for i in every),
    ]
