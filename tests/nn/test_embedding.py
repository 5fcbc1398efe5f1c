"""Properties of the embedding classes besides parity: state, copies, shapes and volumes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity import SHARDED, assert_same_bits
from tp_embed import (
    BatchLayout,
    FakeGang,
    GangError,
    OutputHead,
    Partition,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
    init_scaled_embedding,
)

KINDS = sorted(SHARDED)
ALONE = FakeGang("cpu")
MIDDLE = FakeGang("cpu", rank=1, size=3)


def all_kinds(gang, *args, **options):
    yield StandardEmbedding(*args, **options)
    for kind in KINDS:
        yield SHARDED[kind](gang, *args, **options)


@pytest.mark.parametrize(
    ("embed", "text"),
    [
        (
            StandardEmbedding(11, 6),
            "StandardEmbedding(11, 6, dtype=torch.float32, device='cpu')",
        ),
        (
            StandardEmbedding(11, 6, -1, dtype=torch.bfloat16, sparse=True, device="meta"),
            "StandardEmbedding(11, 6, pad_idx=10, sparse=True, dtype=torch.bfloat16, "
            "device='meta')",
        ),
        (
            ShardedEmbedding(MIDDLE, 11, 6, 0, output="shard"),
            "ShardedEmbedding(11, 6, pad_idx=0, columns=2:4, shard=1/3, output='shard', "
            "dtype=torch.float32, device='cpu')",
        ),
        (
            VocabShardedEmbedding(MIDDLE, 11, 6),
            "VocabShardedEmbedding(11, 6, rows=4:8, shard=1/3, dtype=torch.float32, device='cpu')",
        ),
        (
            VocabShardedEmbedding(ALONE, 11, 6),
            "VocabShardedEmbedding(11, 6, dtype=torch.float32, device='cpu')",
        ),
    ],
)
def test_repr(embed, text):
    assert repr(embed) == text


def test_weight_is_the_one_parameter_and_all_of_the_state():
    for embed in all_kinds(MIDDLE, 11, 6, 2, sparse=True):
        embed(torch.tensor([1, 2]))
        for module in (embed, copy.deepcopy(embed), embed.to(torch.float64)):
            assert [name for name, _ in module.named_parameters()] == ["weight"]
            assert next(module.parameters()) is module.weight
            assert list(module.state_dict()) == ["weight"]
            assert not list(module.buffers())
            assert list(module.modules()) == [module]


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0, 4), {}, "`num_embeddings` must be greater than or equal to 1, but is 0 instead"),
        ((-3, 4), {}, "`num_embeddings` must be .* but is -3 instead"),
        ((5, 0), {}, "`embed_dim` must be greater than or equal to 1, but is 0 instead"),
        ((5, 4, 5), {}, r"`pad_idx` must be in \[-5, 5\) .* but is 5 instead"),
        ((5, 4, -6), {}, r"`pad_idx` must be in \[-5, 5\) .* but is -6 instead"),
    ],
)
def test_bad_sizes_are_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        StandardEmbedding(*args, **options)
    for kind in KINDS:
        with pytest.raises(ValueError, match=message):
            SHARDED[kind](MIDDLE, *args, **options)


def test_bad_outputs_are_named():
    with pytest.raises(ValueError, match=r"'shard'\) for a `Sharded.*but is 'whole' instead"):
        ShardedEmbedding(MIDDLE, 5, 4, output="whole")
    with pytest.raises(ValueError, match=r"Vocab.*is 'shard' instead.*`ShardedEmbedding` gives"):
        VocabShardedEmbedding(MIDDLE, 5, 4, output="shard")
    whole = StandardEmbedding(5, 4)
    with pytest.raises(ValueError, match=r"but is 'shard' instead"):
        VocabShardedEmbedding.from_embedding(whole, MIDDLE, output="shard")


@pytest.mark.parametrize("options", [{}, {"packed": True}], ids=str)
def test_padding_is_not_looked_up(options):
    ids = torch.tensor([[4, 1, -100], [99, -1, 0]])
    lens = [2, 1]
    if options:
        ids, lens = torch.tensor([4, 1, 2, -100, 99]), [1, 2]
    layout = BatchLayout.of(ids, lens, **options)
    if not options:
        ids[1, 0] = 3
    padding = layout.position_indices < 0
    for embed in all_kinds(ALONE, 5, 4, sparse=True):
        output = embed(ids, layout)
        assert not output[padding].any()
        assert torch.equal(output[~padding], embed.weight[ids[~padding]])
        output.sum().backward()
        assert embed.weight.grad.indices().tolist() == [sorted(ids[~padding].tolist())]


def test_what_does_not_fit_together_is_named():
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"'auto', True or False, but is 'yes' instead"):
            SHARDED[kind](MIDDLE, 5, 4, dedup="yes")
        with pytest.raises(ValueError, match=r"`reuse_grad` must be False with `sparse`"):
            SHARDED[kind](MIDDLE, 5, 4, sparse=True, reuse_grad=True)
        embed = SHARDED[kind](MIDDLE, 5, 4, output="sequence")
        with pytest.raises(ValueError, match=r"a dimension to split for `output='sequence'`"):
            embed(torch.tensor(1))
        message = r"have the shape of `x`, \(2, 4\), but has \(2, 3\)"
        for layout in (BatchLayout((2, 3), [1, 2]), BatchLayout((2, 3), None)):
            with pytest.raises(ValueError, match=message):
                embed(torch.ones(2, 4, dtype=torch.int64), layout)


def test_only_a_standard_embedding_is_sharded():
    for kind in KINDS:
        with pytest.raises(TypeError, match=r"a `StandardEmbedding`, but is a `Embedding`"):
            SHARDED[kind].from_embedding(torch.nn.Embedding(5, 4), MIDDLE)


@st.composite
def placed(draw):
    """(V, E, gang, shape of the ids)"""
    size = draw(st.integers(1, 9))
    gang = FakeGang("cpu", rank=draw(st.integers(0, size - 1)), size=size)
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    return draw(st.integers(1, 30)), draw(st.integers(1, 30)), gang, shape


@given(placed())
def test_shapes_at_any_place_of_any_gang(case):
    v, e, gang, shape = case
    own_columns = len(Partition(e, gang.size).shard(gang.rank))
    own_rows = len(Partition(v, gang.size).shard(gang.rank))
    block = shape
    if shape:
        block = [*shape[:-1], len(Partition(shape[-1], gang.size).shard(gang.rank))]
    for kind, output, weight_shape, output_shape in [
        ("embed", "replicated", (v, own_columns), (*shape, e)),
        ("embed", "shard", (v, own_columns), (*shape, own_columns)),
        ("vocab", "replicated", (own_rows, e), (*shape, e)),
        ("embed", "sequence", (v, own_columns), (*block, e)),
        ("vocab", "sequence", (own_rows, e), (*block, e)),
    ]:
        if output == "sequence" and not shape:
            continue
        for device, dedup in (("cpu", "auto"), ("cpu", False), ("meta", "auto")):
            embed = SHARDED[kind](gang, v, e, device=device, output=output, dedup=dedup)
            assert embed.weight.shape == weight_shape
            assert embed.weight.is_meta == (device == "meta")
            result = embed(torch.zeros(shape, dtype=torch.int64, device=device))
            assert result.shape == output_shape
            assert result.device.type == device
            result.sum().backward()
            assert embed.weight.grad.shape == weight_shape
            assert embed.weight.grad.device.type == device


def test_nothing_is_allocated_on_meta():
    # 2^60 numbers, and an init function that would need memory for them.
    for embed in all_kinds(MIDDLE, 1 << 30, 1 << 30, 7, device="meta", init_fn=lambda e: 1 / 0):
        embed.reset_parameters()
        assert embed.weight.is_meta
        assert embed.weight.numel() == len(embed.rows) * len(embed.columns)
        if isinstance(embed, StandardEmbedding):
            sharded = [SHARDED[kind].from_embedding(embed, MIDDLE) for kind in KINDS]
            assert all(s.weight.is_meta for s in sharded)
            assert all(s.to_embedding().weight.shape == (1 << 30, 1 << 30) for s in sharded)


def round_trip(gang, kind, options, frozen, training):
    torch.manual_seed(1)
    whole = StandardEmbedding(11, 7, -2, init_fn=init_scaled_embedding, **options)
    whole.requires_grad_(not frozen).train(training)
    embed = SHARDED[kind].from_embedding(whole, gang)
    again = embed.to_embedding()
    for table in (embed, again):
        assert (table.num_embeddings, table.embed_dim, table.pad_idx) == (11, 7, 9)
        assert table.init_fn is init_scaled_embedding
        assert table.weight.dtype == whole.weight.dtype
        assert table.weight.requires_grad == (not frozen)
        assert table.weight.is_leaf
        assert table.training == training
        assert table.sparse == whole.sparse
    assert_same_bits(again.weight, whole.weight, "tables")
    assert embed.to_embedding(device="meta").weight.is_meta

    # The three tables share no memory.
    before = whole.weight.detach().clone()
    with torch.no_grad():
        embed.weight.fill_(1.0)
    assert_same_bits(whole.weight, before, "tables")
    assert_same_bits(again.weight, before, "tables")
    assert (embed.to_embedding().weight == 1.0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_again(pool, kind, size):
    pool(size, round_trip, kind, {}, False, True)
    pool(size, round_trip, kind, {"dtype": torch.bfloat16}, True, False)
    pool(size, round_trip, kind, {"dtype": torch.float64, "sparse": True}, False, False)


def xavier(embed):
    torch.nn.init.xavier_uniform_(embed.weight)


def large(gang, kind):
    """More than one message holds: 40 MiB."""
    torch.manual_seed(5)
    whole = StandardEmbedding(1003, 10001, 1002, init_fn=xavier)
    torch.manual_seed(5)
    embed = SHARDED[kind](gang, 1003, 10001, 1002, init_fn=xavier)
    rows, columns = embed.rows, embed.columns
    block = whole.weight[rows.start : rows.stop, columns.start : columns.stop]
    assert_same_bits(embed.weight, block, "blocks")
    assert_same_bits(embed.to_embedding().weight, whole.weight, "tables")


@pytest.mark.parametrize("kind", KINDS)
def test_large_tables_travel_in_chunks(pool, kind):
    pool(3, large, kind)


def step(embed, ids):
    embed(ids).pow(2).sum().backward()
    with torch.no_grad():
        embed.weight -= 0.1 * embed.weight.grad.to_dense()
    embed.weight.grad = None


def copied(gang, kind, sparse):
    torch.manual_seed(1)
    whole = StandardEmbedding(11, 7, 3)
    embed = SHARDED[kind](gang, 11, 7, 3, sparse=sparse)
    with torch.no_grad():
        embed.weight.copy_(SHARDED[kind].from_embedding(whole, gang).weight)
    ids = torch.tensor([[1, 3, 10], [1, 5, 0]])

    before = whole.weight.detach().clone()
    dumped = pickle.dumps(embed)
    copies = [copy.deepcopy(embed), pickle.loads(dumped)]
    step(whole, ids)
    for again in copies:
        assert again.gang.rank == gang.rank
        step(again, ids)
        assert_same_bits(again.to_embedding().weight, whole.weight, "tables of a copy")
        assert_same_bits(embed.to_embedding().weight, before, "tables")
    step(embed, ids)
    assert_same_bits(embed.to_embedding().weight, whole.weight, "tables")
    return dumped, before[embed.rows][:, embed.columns]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_copies_train_on_their_own(pool, kind, size):
    for sparse in (False, True):
        for rank, (dumped, block) in enumerate(pool(size, copied, kind, sparse)):
            # This process has no such group.
            embed = pickle.loads(dumped)
            assert (embed.gang.rank, embed.gang.size) == (rank, size)
            assert_same_bits(embed.weight, block, "blocks")
            if size > 1:
                with pytest.raises(GangError, match=f"not rank {rank} of a process group"):
                    embed(torch.tensor([0]))


def emptied(embed):
    embed = embed.to("meta").to_empty(device="cpu")
    embed.reset_parameters()
    return embed


def loaded(embed, **options):
    embed.load_state_dict({"weight": torch.ones(11, 6)}, **options)
    return embed


CHANGES = {
    "as built": lambda embed: embed,
    "copied": copy.deepcopy,
    "unpickled": lambda embed: pickle.loads(pickle.dumps(embed)),
    "converted": lambda embed: embed.to(torch.float64),
    "emptied": emptied,
    "loaded": loaded,
    "assigned": lambda embed: loaded(embed, assign=True),
    "copied while frozen": lambda embed: copy.deepcopy(embed.requires_grad_(False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sparse_gradients_are_coalesced_and_add_up(change):
    first, second = torch.tensor([7, 1, 7, 2]), torch.tensor([[9, 7], [2, 0]])
    for embed in all_kinds(ALONE, 11, 6, 2, sparse=True):
        embed = CHANGES[change](embed).requires_grad_(True)
        for ids, rows in [(first, [1, 7]), (second, [0, 1, 7, 9])]:
            embed(ids).sum().backward()
            assert embed.weight.grad.is_coalesced()
            assert embed.weight.grad.indices().tolist() == [rows]
        count = torch.tensor([1, 1, 0, 0, 0, 0, 0, 3, 0, 1, 0]).to(embed.weight)
        assert torch.equal(embed.weight.grad.to_dense(), count[:, None].expand(11, 6))


class MarkingGang(FakeGang):
    def adopt(self, layer):
        layer.weight.marked = True


@pytest.mark.parametrize(
    "replace",
    [
        lambda embed, head: (embed.to_empty(device="cpu"), head.to_empty(device="cpu")),
        lambda embed, head: (copy.deepcopy(embed), copy.deepcopy(head)),
        lambda embed, head: [
            (m.load_state_dict({"weight": torch.ones(11, 6)}, assign=True) and None) or m
            for m in (embed, head)
        ],
    ],
    ids=["to_empty", "deepcopy", "assign"],
)
def test_gang_marks_new_parameters_too(replace):
    embed = ShardedEmbedding(MarkingGang("cpu"), 11, 6, device="meta")
    head = OutputHead(embed)
    before = embed.weight
    for layer in replace(embed, head):
        assert layer.weight is not before
        assert layer.weight.marked


def test_gang_has_to_be_a_gang():
    for gang in (None, 3, torch.distributed.ProcessGroup):
        with pytest.raises(TypeError, match=r"`gang` must be a `Gang`, .*`ProcessGroupGang\("):
            ShardedEmbedding(gang, 11, 6)


def test_sizes_have_to_be_integers():
    with pytest.raises(TypeError, match="`num_embeddings` must be an integer, but is a `float`"):
        StandardEmbedding(11.5, 6)


def test_table_on_meta_has_no_values_to_gather():
    embed = ShardedEmbedding(FakeGang("cpu", size=2), 11, 6, device="meta")
    assert embed.to_embedding().weight.is_meta
    with pytest.raises(ValueError, match="must be 'meta' for a table on meta, but is 'cpu'"):
        embed.to_embedding(device="cpu")
