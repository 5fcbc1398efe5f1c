"""The planner for tables over all ranks, and tables with an optimizer of their own."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

import plan_tables as benchmark
from forks import run_script
from launch import ROOT
from plan_models import DTYPES
from tp_embed import RowWiseEmbedding, cli
from tp_embed.partition import Partition
from tp_embed.plan import Setup, cost, costs
from tp_embed.plan.lookups import auto_dedup
from tp_embed.plan.tokens import distinct, distinct_of_batches, zipf_distinct, zipf_owner_share


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan")
    run_script(ROOT / "benchmarks" / "plan_tables.py", "--json", out, ranks=4, timeout=600)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: benchmark.name(*case))
def test_engines_hold_and_send_what_is_planned(measured, case):
    rows = [rank[benchmark.CASES.index(case)] for rank in measured]
    setup, strategy = case
    planned = cost(setup, strategy, dedup=auto_dedup(setup, strategy))
    assert max(row["held"] for row in rows) == planned.states
    wanted = benchmark.payloads(planned)
    found = {name: max(row["sent"].get(name, 0) for row in rows) for name in wanted}
    assert found == wanted
    assert {name for row in rows for name in row["sent"]} == set(wanted)


def setup_of(size, placement="block", **changes):
    given = {
        "vocab_size": 160, "embed_dim": 12, "head": False, "tp_size": size, "dtype": "fp32",
        "tokens": 24, "unique_share": 1.0, "device": "cpu", "placement": placement,
        "table_optimizer": "lazy_adam",
    }  # fmt: skip
    return Setup(**given | changes)


def ids_of(setup):
    """Ids of rows that are spread evenly over the ranks, or with the share of the first rank."""
    partition = Partition(setup.vocab_size, setup.tp_size, setup.placement == "cyclic")
    left = [list(partition.shard(rank)) for rank in range(setup.tp_size)]
    count, found = distinct(setup), []
    if setup.owner_share is not None:
        found = [left[0].pop(0) for _ in range(round(setup.owner_share * count))]
        left = left[1:]
    while len(found) < count:
        found += [rows.pop(0) for rows in left]
    return torch.tensor([found[i % count] for i in range(setup.tokens)])


def looked_up(gang, setup, dedup):
    """What a rank puts into collectives."""
    sent = []

    def record(operation, tensors):
        sent.append((operation, sum(tensor.nbytes for tensor in tensors)))
        return nullcontext()

    sizes = setup.vocab_size, setup.embed_dim
    options = {"placement": setup.placement, "dedup": dedup, "dtype": DTYPES[setup.dtype]}
    table = RowWiseEmbedding(gang, *sizes, **options)
    with gang.register_collective_hook(record):
        table(ids_of(setup)).sum().backward()
    return sent


@pytest.mark.parametrize("size", [2, 3, 4])
def test_lookups_send_what_is_planned(pool, size):
    for setup in (
        setup_of(size),
        setup_of(size, "cyclic", dtype="bf16"),
        setup_of(size, unique_share=0.5),
        setup_of(size, owner_share=0.75),
        setup_of(size, owner_share=1.0),
    ):
        for dedup in (True, False):
            planned = cost(setup, "world", dedup=dedup)
            wanted = [(t.operation, t.payload) for t in planned.transfers if t.over == "world"]
            of_ranks = pool(size, looked_up, setup, dedup)
            found = [(row[0][0], max(n for _, n in row)) for row in zip(*of_ranks, strict=True)]
            assert found == wanted, setup
        assert auto_dedup(setup, "world")


def needed(gang, setup, dedup):
    """The most bytes of a lookup beside its Parameter."""
    sizes = setup.vocab_size, setup.embed_dim
    table = RowWiseEmbedding(gang, *sizes, placement=setup.placement, dedup=dedup)
    ids, tracker = ids_of(setup), MemTracker()
    with tracker:
        table(ids)
    (found,) = tracker.get_tracker_snapshot("peak").values()
    by_kind = {str(kind).split(".")[-1]: nbytes for kind, nbytes in found.items()}
    return by_kind["Total"] - by_kind["PARAM"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_lookups_need_what_is_planned(pool, size):
    large = {"vocab_size": 480, "embed_dim": 1024, "tokens": 96}
    for setup in (
        setup_of(size, **large),
        setup_of(size, "cyclic", unique_share=0.5, **large),
        setup_of(size, owner_share=0.75, **large),
    ):
        for dedup in (True, False):
            most = max(pool(size, needed, setup, dedup))
            planned = cost(setup, "world", dedup=dedup).exchange
            assert 0 <= most - planned <= 8 * (size + 12) * setup.tokens, (setup, dedup)


def test_a_placement_decides_what_the_busiest_rank_holds():
    even, block, cyclic = (
        cost(setup_of(4, placement, owner_share=share), "world", dedup=True)
        for placement, share in [("block", None), ("block", 1.0), ("cyclic", 1.0)]
    )
    assert cyclic == even
    assert (block.rows, even.rows) == (24, 6)
    assert block.sent > 2 * even.sent


@pytest.mark.parametrize(("placement", "idle"), [("block", 1), ("cyclic", 0)])
def test_ranks_without_rows_are_named(capsys, placement, idle):
    table = ("--vocab-size", "6", "--embed-dim", "2", "--no-head", "--dp", "4", "--dtype", "fp32")
    given = ("--strategy", "world", "--placement", placement, "--zero-stage", "0")
    assert cli.main(["plan", *table, *given]) == 0
    warned = "1 of 4 ranks hold no part of the table." in capsys.readouterr().err
    assert warned == bool(idle)


def test_the_first_block_holds_most_rows_of_zipf():
    generator = torch.Generator().manual_seed(0)
    chances = 1 / torch.arange(1, 3001, dtype=torch.float64)
    drawn = torch.multinomial(chances, 4000, replacement=True, generator=generator).unique()
    share = zipf_owner_share(3000, 4000, 4)
    assert share == pytest.approx((drawn < 750).double().mean().item(), abs=0.03)
    assert zipf_owner_share(3000, 4000, 1) == 1.0


def test_distinct_ids_of_several_batches():
    setup = Setup(100_000, 8, tokens=2048)
    assert distinct_of_batches(setup, 1) == distinct(setup)
    assert distinct_of_batches(setup, 4) == round(zipf_distinct(100_000, 8192))
    given = Setup(100_000, 8, tokens=2048, unique_share=0.23)
    # What a BPE of 32k makes of Python's source: 0.14 of 8k tokens, 0.08 of 32k.
    assert 0.14 < distinct_of_batches(given, 4) / 8192 < 1.3 * 0.14
    assert 0.08 < distinct_of_batches(given, 16) / 32768 < 1.7 * 0.08
    assert distinct_of_batches(Setup(100, 8, tokens=64, unique_share=1.0), 4) == 100
    assert distinct_of_batches(Setup(100, 8, tokens=1, unique_share=1.0), 4) == 4


def test_states_do_not_grow_with_the_data_parallel_ranks_and_shrink_over_all():
    of_one, of_eight = (
        Setup(1 << 20, 160, head=False, dp_size=ranks, table_optimizer="rowwise_adagrad")
        for ranks in (1, 8)
    )
    items = (1 << 20) * 160
    assert cost(of_one, "vocab").master == cost(of_eight, "vocab").master == 2 * items
    assert cost(of_eight, "world").weight == 2 * items // 8
    assert cost(of_eight, "world").moments == 4 * (1 << 20) // 8
    # The engine's optimizer trains the whole table of the strategy "none".
    assert cost(of_eight, "none").moments == 8 * items // 8


def test_world_has_a_column_where_it_can_be():
    def has_world(**changes):
        setup = Setup(**{"vocab_size": 64, "embed_dim": 8, "dp_size": 2, "head": False} | changes)
        return any(each.strategy == "world" for each in costs(setup))

    assert has_world(table_optimizer="lazy_adam")
    assert has_world(table_optimizer="lazy_adam", head=True)
    assert has_world(zero_stage=0, dtype="fp32")
    assert not has_world()
    assert not has_world(zero_stage=0, dtype="fp32", head=True, tied=True)
    assert not has_world(table_optimizer="lazy_adam", output="sequence")
    assert not has_world(table_optimizer="lazy_adam", dp_size=1)
    with pytest.raises(
        ValueError, match="`table_optimizer` must be given for the strategy 'world'"
    ):
        cost(Setup(64, 8, dp_size=2), "world")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tied": True}, "`tied` must be false with `table_optimizer`"),
        ({"zero_stage": 0, "dtype": "fp32", "optimizer": "sgd", "sparse": True}, "`sparse` must"),
        ({"grad_dtype": "fp32"}, "`grad_dtype` must be 'bf16' with `table_optimizer` at ZeRO 1"),
        ({"table_optimizer": "adam"}, "`table_optimizer` must be one of"),
        ({"table_optimizer": None, "table_decay": True}, "`table_decay` must be false without"),
        ({"placement": "random"}, "`placement` must be one of"),
    ],
)
def test_setups_that_engines_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        Setup(**{"vocab_size": 10, "embed_dim": 4, "table_optimizer": "lazy_adam"} | values)
