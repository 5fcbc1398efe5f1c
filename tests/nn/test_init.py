"""The initial table depends only on seed, row and column, not on the gang."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import init as torch_init

from parity import SHARDED, assert_same_bits
from tp_embed import FakeGang, ShardedEmbedding, StandardEmbedding, blockwise
from tp_embed.nn import init

SIZES = [1, 2, 3, 4]
KINDS = sorted(SHARDED)


def users_own(embed, gain=1.0):
    torch_init.xavier_uniform_(embed.weight, gain)


@blockwise
def users_marked(embed, rate=1.0):
    init.fill(embed, lambda tile, generator: tile.exponential_(rate, generator=generator))


# The random init functions, each with torch's equivalent.
RANDOM = {
    "scaled": (init.scaled, lambda w: w.normal_(0, w.size(1) ** -0.5)),
    "normal": (init.normal, torch_init.normal_),
    "normal with options": (
        partial(init.normal, mean=0.5, std=0.1),
        lambda w: torch_init.normal_(w, 0.5, 0.1),
    ),
    "uniform": (init.uniform, torch_init.uniform_),
    "uniform with options": (
        partial(init.uniform, a=-3.0, b=2.0),
        lambda w: torch_init.uniform_(w, -3.0, 2.0),
    ),
    "trunc_normal": (init.trunc_normal, torch_init.trunc_normal_),
    "trunc_normal with options": (
        partial(init.trunc_normal, mean=0.2, std=0.5, a=-0.7, b=0.6),
        lambda w: torch_init.trunc_normal_(w, 0.2, 0.5, -0.7, 0.6),
    ),
    "xavier_uniform": (init.xavier_uniform, torch_init.xavier_uniform_),
    "xavier_normal": (
        partial(init.xavier_normal, gain=3.0),
        lambda w: torch_init.xavier_normal_(w, 3.0),
    ),
    "kaiming_uniform": (init.kaiming_uniform, torch_init.kaiming_uniform_),
    "kaiming_uniform with options": (
        partial(init.kaiming_uniform, a=0.3, mode="fan_out"),
        lambda w: torch_init.kaiming_uniform_(w, a=0.3, mode="fan_out"),
    ),
    "kaiming_normal": (
        partial(init.kaiming_normal, nonlinearity="relu"),
        lambda w: torch_init.kaiming_normal_(w, nonlinearity="relu"),
    ),
    "a user's own": (users_own, torch_init.xavier_uniform_),
    "a user's own, partial": (
        partial(users_own, gain=2.0),
        lambda w: torch_init.xavier_uniform_(w, 2.0),
    ),
    "a user's marked": (users_marked, lambda w: w.exponential_()),
    "a user's marked, partial": (partial(users_marked, rate=2.0), lambda w: w.exponential_(2.0)),
}

FILLED = {
    **{name: init_fn for name, (init_fn, _) in RANDOM.items()},
    "default": None,
    "zeros": init.zeros,
    "constant": partial(init.constant, value=0.3),
}

# Several tiles of 256 x 128, none aligned with a shard; fewer rows or columns than ranks.
TABLES = [(700, 150, -3), (3, 5, None), (300, 2, 1)]


def drawn(gang, kind, names, seeds=(7, 7, 7, 7), dtype=None):
    """Returns the whole tables, and the next numbers of torch's generator."""
    torch.manual_seed(seeds[gang.rank])
    tables = []
    for name in names:
        for *sizes, pad_idx in TABLES:
            embed = SHARDED[kind](gang, *sizes, pad_idx, init_fn=FILLED[name], dtype=dtype)
            tables.append(embed.to_embedding().weight.detach())
    return tables, torch.rand(3)


def expected(names, seed=7, dtype=None):
    torch.manual_seed(seed)
    tables = []
    for name in names:
        for *sizes, pad_idx in TABLES:
            embed = StandardEmbedding(*sizes, pad_idx, init_fn=FILLED[name], dtype=dtype)
            tables.append(embed.weight.detach())
    return tables, torch.rand(3)


def assert_drawn(result, wanted):
    for table, whole in zip(result[0], wanted[0], strict=True):
        assert_same_bits(table, whole, "tables")
    assert torch.equal(result[1], wanted[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILLED)
def test_table_and_generator_do_not_depend_on_the_gang(pool, name, kind, size):
    wanted = expected([name])
    for result in pool(size, drawn, kind, [name]):
        assert_drawn(result, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_table_of_another_dtype_does_not_depend_on_the_gang(pool, kind, dtype):
    wanted = expected(list(FILLED), dtype=dtype)
    for result in pool(3, drawn, kind, list(FILLED), dtype=dtype):
        assert_drawn(result, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_other_generators_agree_on_the_table_of_rank_0(pool, kind):
    names = list(FILLED)
    tables, _ = expected(names, seed=7)
    for rank, result in enumerate(pool(3, drawn, kind, names, [7, 8, 9])):
        # Each generator advances as it would have without the gang.
        assert_drawn(result, (tables, expected(names, seed=7 + rank)[1]))


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("kind", KINDS)
def test_rank_of_a_fake_gang_holds_its_block(kind, name):
    torch.manual_seed(7)
    whole = StandardEmbedding(700, 150, init_fn=FILLED[name]).weight
    for rank in range(3):
        torch.manual_seed(7)
        gang = FakeGang("cpu", rank=rank, size=3)
        embed = SHARDED[kind](gang, 700, 150, init_fn=FILLED[name])
        rows, columns = embed.rows, embed.columns
        block = whole[rows.start : rows.stop, columns.start : columns.stop]
        assert_same_bits(embed.weight, block, f"blocks of rank {rank}")
        assert embed.weight.is_leaf
        assert embed.weight.requires_grad


@pytest.mark.parametrize("name", RANDOM)
def test_distribution_is_that_of_torch(name):
    init_fn, of_torch = RANDOM[name]
    ours = StandardEmbedding(700, 150, init_fn=init_fn).weight.detach()
    torchs = of_torch(torch.empty(700, 150))
    count, std = ours.numel(), torchs.std()

    # The Kolmogorov-Smirnov statistic, with a bound that one test in a thousand exceeds.
    values, both = [t.view(-1).sort().values for t in (ours, torchs)], torch.cat([ours, torchs])
    a, b = (torch.searchsorted(v, both, right=True) / count for v in values)
    assert (a - b).abs().max() < 1.95 * (2 / count) ** 0.5

    assert (ours.mean() - torchs.mean()).abs() < 0.02 * std
    assert (ours.std() / std - 1).abs() < 0.02
    if "uniform" in name or "trunc" in name:
        assert (ours.min() - torchs.min()).abs() < 1e-3 * std
        assert (ours.max() - torchs.max()).abs() < 1e-3 * std


@pytest.mark.parametrize("name", RANDOM)
def test_tiles_rows_and_tables_are_drawn_independently(name):
    ours, other = (StandardEmbedding(700, 150, init_fn=FILLED[name]).weight for _ in range(2))
    # Drawing a tile twice would repeat 32768 of 105000 numbers.
    assert ours.unique().numel() > 0.98 * ours.numel()
    assert (ours == other).float().mean() < 0.01
    with torch.no_grad():
        between_rows = torch.corrcoef(ours).fill_diagonal_(0)
    assert between_rows.abs().max() < 6 * 150**-0.5


BLOCKWISE = [name for name in FILLED if "own" not in name]
USE_V = ("xavier_uniform", "xavier_normal", "kaiming_uniform with options")


@pytest.mark.parametrize("name", [name for name in BLOCKWISE if name not in USE_V])
def test_table_that_grows_keeps_its_rows(name):
    torch.manual_seed(7)
    small = StandardEmbedding(700, 150, init_fn=FILLED[name]).weight
    torch.manual_seed(7)
    large = StandardEmbedding(1000, 150, init_fn=FILLED[name]).weight
    assert_same_bits(large[:700], small, "rows")


@pytest.mark.parametrize("name", BLOCKWISE)
def test_bf16_table_is_the_rounded_fp32_table(name):
    wanted, _ = expected([name])
    for table, whole in zip(expected([name], dtype=torch.bfloat16)[0], wanted, strict=True):
        assert_same_bits(table, whole.bfloat16(), "tables")


@pytest.mark.parametrize("name", FILLED)
def test_pad_row_is_zero_and_the_only_one(name):
    for pad_idx in (0, 5, 699, -1, -700):
        table = StandardEmbedding(700, 150, pad_idx, init_fn=FILLED[name]).weight
        assert not table[pad_idx].any()
        others = torch.arange(700) != pad_idx % 700
        assert name == "zeros" or table[others].any(1).all()


def drawn_after_meta(gang, kind, name):
    torch.manual_seed(3)
    embed = SHARDED[kind](gang, 700, 150, -3, init_fn=FILLED[name], device="meta")
    assert embed.weight.is_meta
    untouched = torch.rand(1)
    embed.to_empty(device="cpu")
    torch.manual_seed(7)
    embed.reset_parameters()
    return embed.to_embedding().weight.detach(), untouched


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("kind", KINDS)
def test_table_that_was_on_meta_is_the_same(pool, kind, name):
    torch.manual_seed(3)
    untouched = torch.rand(1)
    (wanted, *_), _ = expected([name])
    for table, number in pool(3, drawn_after_meta, kind, name):
        assert_same_bits(table, wanted, "tables")
        assert torch.equal(number, untouched)


@pytest.mark.parametrize("name", [name for name in BLOCKWISE if FILLED[name]])
def test_marked_function_does_nothing_on_meta(name):
    embed = StandardEmbedding(700, 150, device="meta")
    before = torch.random.get_rng_state()
    FILLED[name](embed)
    assert torch.equal(torch.random.get_rng_state(), before)


def fails(embed):
    raise OSError("no such file: table.bin")


def fail(gang, kind):
    SHARDED[kind](gang, 10, 4, init_fn=fails)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_a_users_function_is_raised_on_every_rank(pool, kind, size):
    outcomes = pool.outcomes(size, fail, kind)
    for rank, (ok, error) in enumerate(outcomes):
        last = error.strip().splitlines()[-1]
        assert not ok
        assert "no such file: table.bin" in last
        if rank == 0:
            assert last.startswith("OSError")
        else:
            assert "GangError: `init_fn` failed on rank 0 of" in last
    # Nothing is half-done.
    wanted = expected(["a user's own"])
    for result in pool(size, drawn, kind, ["a user's own"]):
        assert_drawn(result, wanted)


def from_tensor(gang, kind, source, **options):
    init_fn = partial(init.from_tensor, source=source, **options)
    embed = SHARDED[kind](gang, *TABLES[0], init_fn=init_fn)
    return embed.to_embedding().weight.detach()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_from_tensor_is_the_table_with_its_pad_row(pool, tmp_path, kind, size):
    table = torch.randn(700, 150).bfloat16()
    save_file({"wte": table}, tmp_path / "one.safetensors")
    save_file({"wte": table, "other": table[:2].clone()}, tmp_path / "two.safetensors")
    wanted = table.float()
    for source, options in [
        (table, {}),
        (tmp_path / "one.safetensors", {}),
        (str(tmp_path / "two.safetensors"), {"key": "wte"}),
    ]:
        for whole in pool(size, from_tensor, kind, source, **options):
            assert_same_bits(whole, wanted, "tables")


def test_from_tensor_names_what_does_not_fit(tmp_path):
    path = tmp_path / "table.safetensors"
    save_file({"a": torch.zeros(4, 7), "b": torch.zeros(700, 150)}, path)
    gang = FakeGang("cpu", rank=1, size=2)
    for source, options, message in [
        (torch.zeros(150, 700), {}, r"`source` must have .*\(700, 150\).*has \(150, 700\) instead"),
        (path, {"key": "a"}, r"table.safetensors:a` must have .*but has \(4, 7\) instead"),
        (path, {"key": "c"}, r"`key` must name .*\['a', 'b'\], but is 'c' instead"),
        (path, {}, r"`key` must name .*\['a', 'b'\], but is None instead"),
    ]:
        for kind in KINDS:
            with pytest.raises(ValueError, match=message):
                from_tensor(gang, kind, source, **options)


def test_kaiming_names_an_unknown_mode():
    with pytest.raises(ValueError, match="`mode` must be 'fan_in' or 'fan_out', but is 'fan'"):
        StandardEmbedding(3, 2, init_fn=partial(init.kaiming_normal, mode="fan"))


def replaces_the_weight(embed):
    embed.weight.data = torch.ones(embed.num_embeddings, embed.embed_dim)


def wrong_dtype(gang):
    return ShardedEmbedding(gang, 11, 6, init_fn=replaces_the_weight, dtype=torch.bfloat16)


def test_init_fn_has_to_leave_the_weight_as_it_is(pool):
    (ok0, error0), (ok1, error1) = pool.outcomes(2, wrong_dtype)
    assert not ok0
    assert not ok1
    for part in ("ValueError: `init_fn` must fill `embed.weight`", "(11, 6), torch.bfloat16"):
        assert part in error0
    assert "GangError: `init_fn` failed on rank 0" in error1
