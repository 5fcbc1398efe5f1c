"""Arrays in files are read and written as torch slices tensors."""

from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tp_embed.checkpoint import CheckpointError, Cut, Rule
from tp_embed.checkpoint.cuts import find_rule, is_table, join
from tp_embed.checkpoint.files import arrays
from tp_embed.checkpoint.files.arrays import Joined, Span, Tile, View
from tp_embed.checkpoint.files.derived import Cast, Copies

any_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def stored(path: Path, tensor: torch.Tensor, offset: int = 0) -> Span:
    """Writes ``tensor`` to a new file, and returns it as a flat array."""
    path.write_bytes(b"\1" * offset + bytes(tensor.flatten().view(torch.uint8).tolist()))
    return Span(path, offset, tensor.numel(), tensor.dtype)


@st.composite
def views(draw):
    """Draws a view of a flat tensor that torch can make, and a box in it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    view = torch.arange(prod(shape), dtype=torch.int32).view(shape)
    view = view.permute(draw(st.permutations(range(len(shape)))))
    for dim in range(view.dim()):
        step = draw(st.integers(1, 2))
        view = view[(slice(None),) * dim + (slice(draw(st.integers(0, 1)), None, step),)]
    start, sizes = [], []
    for size in view.shape:
        start.append(draw(st.integers(0, size)))
        sizes.append(draw(st.integers(0, size - start[-1])))
    return view, tuple(start), tuple(sizes)


def box(tensor, start, sizes):
    return tensor[tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True))]


@any_tmp_path
@given(case=views(), chunk=st.sampled_from([4, 16, 64, 2**20]))
def test_boxes_of_views_are_those_of_torch(tmp_path, monkeypatch, case, chunk):
    view, start, sizes = case
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    base = torch.arange(max(1, view.untyped_storage().nbytes() // 4), dtype=torch.int32)
    array = View(
        stored(tmp_path / "x", base, offset=3),
        view.shape,
        strides=view.stride(),
        offset=view.storage_offset(),
    )
    out = torch.empty(sizes, dtype=torch.int32)
    array.read(start, out)
    assert torch.equal(out, box(view, start, sizes))

    strided = torch.zeros(*(2 * n for n in sizes), dtype=torch.int32)[
        tuple(slice(None, None, 2) for _ in sizes)
    ]
    array.read(start, strided)
    assert torch.equal(strided, box(view, start, sizes))

    new = -1 - torch.arange(prod(sizes), dtype=torch.int32).view(sizes)
    array.write(start, new)
    expected = base.as_strided(view.shape, view.stride(), view.storage_offset()).clone()
    box(expected, start, sizes).copy_(new)
    assert torch.equal(array.load(), expected)
    assert (tmp_path / "x").read_bytes()[:3] == b"\1\1\1"


@any_tmp_path
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dim=st.integers(0, 1),
    chunk=st.sampled_from([8, 32, 2**20]),
)
def test_joined_arrays_are_concatenated_tensors(tmp_path, monkeypatch, sizes, dim, chunk):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    shards = [torch.randn(n, 3) if dim == 0 else torch.randn(3, n) for n in sizes]
    cut = Cut(dim, tuple((range(sum(sizes[:i]), sum(sizes[: i + 1])),) for i in range(len(sizes))))
    whole = torch.cat(shards, dim)
    files = [stored(tmp_path / f"{i}", shard) for i, shard in enumerate(shards)]
    array = join("x", cut, [View(f, s.shape) for f, s in zip(files, shards, strict=True)])
    assert torch.equal(array.load(), whole)

    new = torch.randn(whole.shape)
    for start, shape in arrays.boxes(whole.shape, 4):
        array.write(start, box(new, start, shape))
    assert torch.equal(array.load(), new)
    for file, part in zip(files, new.split(sizes, dim), strict=True):
        assert torch.equal(file.load(), part.flatten())


@any_tmp_path
@given(
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    limit=st.integers(1, 60),
)
def test_boxes_cover_a_shape_in_order_and_stay_small(monkeypatch, shape, limit):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 4 * limit)
    whole = torch.arange(prod(shape)).view(shape)
    parts = [box(whole, start, sizes) for start, sizes in arrays.boxes(shape, 4)]
    assert all(0 < part.numel() <= limit for part in parts)
    assert torch.equal(
        torch.cat([part.flatten() for part in parts]) if parts else whole.flatten(), whole.flatten()
    )


def test_parts_that_overlap_or_leave_gaps_are_refused(tmp_path):
    array = View(stored(tmp_path / "x", torch.zeros(6)), (3, 2))
    for starts in ([(0, 0), (2, 0)], [(0, 0), (4, 0)], [(0, 0)], [(0, 0), (3, 0), (3, 0)]):
        with pytest.raises(CheckpointError, match=r"must (cover|lie)"):
            Joined((6, 2), torch.float32, [Tile.whole(start, array) for start in starts])
    with pytest.raises(CheckpointError, match="lie within"):
        Joined((3, 2), torch.float16, [Tile.whole((0, 0), array)])


def test_views_over_the_end_of_a_storage_are_refused(tmp_path):
    flat = stored(tmp_path / "x", torch.zeros(6))
    for shape, strides, offset in [
        ((7,), (1,), 0),
        ((3, 2), (2, 1), 1),
        ((2,), (6,), 0),
        ((2,), (-1,), 5),
        ((1,), (1,), -1),
    ]:
        with pytest.raises(CheckpointError, match="lie in its storage"):
            View(flat, shape, strides=strides, offset=offset)
    assert View(flat, (0, 4)).load().shape == (0, 4)


def test_a_file_that_has_been_truncated_is_named(tmp_path):
    array = stored(tmp_path / "x", torch.zeros(6))
    (tmp_path / "x").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"x` must have bytes up to 24, but ends at 20"):
        array.load()


def test_copies_that_differ_are_refused_also_where_numbers_are_equal(tmp_path):
    zero, minus_zero = torch.zeros(3), -torch.zeros(3)
    files = [stored(tmp_path / "a", zero), stored(tmp_path / "b", minus_zero)]
    with pytest.raises(CheckpointError, match="`norm` must be the same on every rank"):
        Copies("norm", files).load()
    nan = torch.full((3,), torch.nan)
    files = [stored(tmp_path / "a", nan), stored(tmp_path / "b", nan)]
    assert Copies("norm", files).load().isnan().all()


def test_casts_refuse_values_out_of_range_and_keep_infinities_and_nan(tmp_path):
    array = stored(tmp_path / "x", torch.tensor([1.0, 7e4]))
    with pytest.raises(CheckpointError, match=r"range of torch.float16, but the largest is 7e\+04"):
        Cast("w", array, torch.float16).load()
    array = stored(tmp_path / "x", torch.tensor([torch.inf, torch.nan]))
    assert str(Cast("w", array, torch.float16).load()) == "tensor([inf, nan], dtype=torch.float16)"


def test_rules_say_how_parameters_are_cut():
    assert Rule.parse("a.*=0").cut("a.b", (5, 2), 2) == Cut(0, ((range(3),), (range(3, 5),)))
    assert Rule.parse("*=replicated").cut("a", (5, 2), 2) is None
    assert Rule.parse("*=embed").cut("a", (5, 3), 2) == Cut(1, ((range(2),), (range(2, 3),)))
    fused = Cut(0, ((range(2), range(4, 6)), (range(2, 4), range(6, 8))))
    assert Rule.parse("qk=0/2").cut("qk", (8,), 2) == fused
    assert Rule.parse("qk=0:4,4").cut("qk", (8,), 2) == fused
    assert fused.blocks == (4, 4)
    assert fused.over(1).ranges == ((range(4), range(4, 8)),)
    rules = [Rule.parse("a=0"), Rule.parse("*=1"), Rule.parse("b=embed")]
    assert find_rule(rules, "b").dim == 1
    assert not is_table(rules, "b")
    assert is_table([], "model.embed_tokens.weight")


@pytest.mark.parametrize(
    "text",
    ["a", "a=", "=0", "a=x", "a=0/0", "a=-1", "a=0:", "a=0/2:3", "a=1.5"],
)
def test_rules_that_cannot_be_read_are_refused(text):
    with pytest.raises(CheckpointError, match=r"must be `PATTERN=HOW`.*but is `"):
        Rule.parse(text)


def test_rules_that_do_not_fit_are_refused():
    with pytest.raises(CheckpointError, match="must have a dimension 2"):
        Rule.parse("a=2").cut("a", (4, 4), 2)
    with pytest.raises(CheckpointError, match=r"blocks \(3,\) along dimension 0"):
        Rule.parse("a=0/3").cut("a", (4, 4), 2)
    with pytest.raises(CheckpointError, match=r"blocks \(3, 2\)"):
        Rule.parse("a=0:3,2").cut("a", (4, 4), 2)


@given(
    blocks=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    first=st.integers(1, 4),
    second=st.integers(1, 4),
)
def test_cuts_know_their_blocks_and_cut_them_over_other_ranks(blocks, first, second):
    cut = Cut.even(0, blocks, first)
    assert cut.blocks == tuple(blocks)
    assert cut.over(second) == Cut.even(0, blocks, second)
