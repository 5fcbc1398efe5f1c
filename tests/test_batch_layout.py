from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_embed import BatchLayout


def test_padded():
    layout = BatchLayout.of(torch.zeros(4, 6), seq_lens=[4, 2, 6, 5])
    assert layout.width == 6
    assert list(layout.seq_begin_indices) == [0, 6, 12, 18, 24]
    assert list(layout.seq_lens) == [4, 2, 6, 5]
    assert (layout.min_seq_len, layout.max_seq_len) == (2, 6)
    assert (layout.padded, layout.packed) == (True, False)
    assert layout.position_indices.tolist() == [
        [0, 1, 2, 3, -1, -1],
        [0, 1, -1, -1, -1, -1],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, -1],
    ]


def test_packed():
    layout = BatchLayout.of(torch.zeros(9), seq_lens=[4, 1, 2], packed=True)
    assert layout.width == 9
    assert list(layout.seq_begin_indices) == [0, 4, 5, 7]
    assert list(layout.seq_lens) == [4, 1, 2]
    assert (layout.min_seq_len, layout.max_seq_len) == (1, 4)
    assert (layout.padded, layout.packed) == (True, True)
    assert layout.position_indices.tolist() == [0, 1, 2, 3, 0, 0, 1, -1, -1]


@pytest.mark.parametrize("seq_lens", [None, [3, 3]])
def test_full_batch_has_no_padding(seq_lens):
    layout = BatchLayout((2, 3), seq_lens)
    assert not layout.padded
    assert list(layout.seq_lens) == [3, 3]
    assert list(layout.seq_begin_indices) == [0, 3, 6]
    assert layout.position_indices.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_packed_batch_without_lengths_is_one_sequence():
    layout = BatchLayout((5,), None, packed=True)
    assert not layout.padded
    assert list(layout.seq_lens) == [5]
    assert list(layout.seq_begin_indices) == [0, 5]
    assert layout.position_indices.tolist() == [0, 1, 2, 3, 4]


def test_packed_batch_can_be_full():
    layout = BatchLayout((5,), [2, 3], packed=True)
    assert not layout.padded
    assert layout.position_indices.tolist() == [0, 1, 0, 1, 2]


def test_batch_without_sequences():
    layout = BatchLayout.of(torch.zeros(0, 3))
    assert list(layout.seq_lens) == []
    assert list(layout.seq_begin_indices) == [0]
    assert (layout.min_seq_len, layout.max_seq_len) == (3, 0)
    assert layout.position_indices.shape == (0, 3)
    assert layout.seq_lens_pt.dtype == torch.int32
    assert not layout.padded


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 7), (2, 5, 7, 3)])
def test_only_the_leading_dimensions_of_a_padded_batch_count(shape):
    assert BatchLayout.of(torch.zeros(shape)).position_indices.shape == (2, 5)


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 7, 3)])
def test_only_the_first_dimension_of_a_packed_batch_counts(shape):
    assert BatchLayout.of(torch.zeros(shape), packed=True).position_indices.shape == (5,)


@pytest.mark.parametrize(("shape", "packed"), [((2, 5), False), ((5,), True)])
def test_tensors_repeat_the_sequences_in_int32(shape, packed):
    layout = BatchLayout(shape, [3, 2], packed=packed)
    for tensor, sequence in [
        (layout.seq_lens_pt, layout.seq_lens),
        (layout.seq_begin_indices_pt, layout.seq_begin_indices),
    ]:
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == list(sequence)
    assert layout.position_indices.dtype == torch.int64


@pytest.mark.parametrize(("shape", "packed"), [((2, 5), False), ((5,), True)])
def test_tensors_are_where_the_batch_is(shape, packed):
    on_cpu = BatchLayout(shape, [3, 2], packed=packed)
    for device in ("cpu", "meta"):
        layout = BatchLayout.of(torch.zeros(shape, device=device), [3, 2], packed=packed)
        for name in ("position_indices", "seq_lens_pt", "seq_begin_indices_pt"):
            assert getattr(layout, name).device.type == device
            assert getattr(layout, name).shape == getattr(on_cpu, name).shape


def test_lengths_can_be_a_tensor():
    layout = BatchLayout((2, 5), torch.tensor([3, 2]))
    assert list(layout.seq_lens) == [3, 2]
    assert all(type(length) is int for length in layout.seq_lens)


def test_repr_shows_what_the_layout_is():
    assert repr(BatchLayout((2, 3), [3, 1])) == (
        "BatchLayout(width=3, seq_begin_indices=[0, 3, 6], seq_lens=[3, 1], "
        "min_seq_len=1, max_seq_len=3, padded=True, packed=False)"
    )


@pytest.mark.parametrize(
    ("shape", "seq_lens", "packed", "message"),
    [
        ((4,), None, False, "`shape` must be 2 dimensional for a padded batch, but is 1 dim"),
        ((4, 2, 3), None, False, "`shape` must be 2 dimensional for a padded batch, but is 3 dim"),
        ((4, 2), None, True, "`shape` must be 1 dimensional for a packed batch, but is 2 dim"),
        ((4, 0), None, False, r"`shape\[1\]` must be .* equal to 1, but is 0 instead"),
        ((0,), None, True, r"`shape\[0\]` must be .* equal to 1, but is 0 instead"),
        ((2, 3), [1], False, r"`len\(seq_lens\)` must be .* `shape\[0\]` \(2\), but is 1 instead"),
        ((2, 3), [1, 2, 3], False, r"`len\(seq_lens\)` must be .* but is 3 instead"),
        ((2, 3), [], False, r"`len\(seq_lens\)` must be .* but is 0 instead"),
        ((2, 3), [3, 4], False, r"in \[1, 3\] .* the length at index 1 is 4 instead"),
        ((2, 3), [0, 3], False, r"in \[1, 3\] .* the length at index 0 is 0 instead"),
        ((2, 3), [2, -1], False, r"in \[1, 3\] .* the length at index 1 is -1 instead"),
        ((5,), [2, 6], True, r"in \[1, 5\] .* the length at index 1 is 6 instead"),
        ((5,), [2, 0], True, r"in \[1, 5\] .* the length at index 1 is 0 instead"),
        ((5,), [], True, "`seq_lens` must hold at least one length for a packed batch"),
        ((5,), [3, 3], True, r"`sum\(seq_lens\)` must be .* `shape\[0\]` \(5\), but is 6 instead"),
    ],
)
def test_what_does_not_fit_is_named(shape, seq_lens, packed, message):
    with pytest.raises(ValueError, match=message):
        BatchLayout(shape, seq_lens, packed=packed)


def test_batch_of_too_few_dimensions_is_refused():
    with pytest.raises(ValueError, match="must be 2 dimensional for a padded batch, but is 1"):
        BatchLayout.of(torch.zeros(4), [4])


def test_lengths_are_not_rounded():
    with pytest.raises((TypeError, ValueError), match="seq_lens"):
        BatchLayout((2, 3), [1.5, 3])


@st.composite
def layouts(draw):
    """(shape, seq_lens, packed)"""
    width = draw(st.integers(1, 12))
    lengths = st.lists(st.integers(1, width), max_size=6)
    if not draw(st.booleans()):
        seq_lens = draw(lengths)
        return (len(seq_lens), width), seq_lens, False
    seq_lens = draw(lengths.filter(bool))
    return (sum(seq_lens) + draw(st.integers(0, 5)),), seq_lens, True


@given(layouts())
def test_position_indices_are_those_of_a_loop(case):
    shape, seq_lens, packed = case
    layout = BatchLayout(shape, seq_lens, packed=packed)

    if packed:
        rows = [[p for length in seq_lens for p in range(length)]]
    else:
        rows = [list(range(length)) for length in seq_lens]
    width = shape[-1]
    rows = [row + [-1] * (width - len(row)) for row in rows]
    assert layout.position_indices.tolist() == (rows[0] if packed else rows)

    # The flattened batch holds each sequence from its start.
    flat = layout.position_indices.flatten()
    starts = layout.seq_begin_indices
    assert len(starts) == len(seq_lens) + 1
    for start, length in zip(starts, layout.seq_lens, strict=False):
        assert flat[start : start + length].tolist() == list(range(length))
    assert layout.padded == bool((flat == -1).any())
    assert (layout.width, layout.packed) == (width, packed)
    if seq_lens:
        assert (layout.min_seq_len, layout.max_seq_len) == (min(seq_lens), max(seq_lens))


SEED_EXAMPLE = """
# Create token embeddings
embed = StandardEmbedding(
    num_embeddings=32000,  # vocabulary size
    embed_dim=512,
    pad_idx=0,
    init_fn=init_scaled_embedding
)

# Use with BatchLayout
tokens = torch.randint(0, 32000, (4, 6))  # (batch, seq)
batch_layout = BatchLayout.of(tokens, seq_lens=[4, 2, 3, 5])

embeddings = embed(tokens)  # (4, 6, 512)
"""


def test_example_of_the_former_api_runs_with_another_import():
    imports = "import torch\nfrom tp_embed import BatchLayout, StandardEmbedding"
    names = {}
    exec(f"{imports}, init_scaled_embedding\n{SEED_EXAMPLE}", names)
    assert names["embeddings"].shape == (4, 6, 512)
    assert list(names["batch_layout"].seq_lens) == [4, 2, 3, 5]
    std = names["embed"].weight.std()
    assert abs(std * 512**0.5 - 1) < 0.01
    assert not names["embed"].weight[0].any()
