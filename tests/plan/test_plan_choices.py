"""What the planner chooses and recommends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plan_models import Model
from tp_embed import FakeGang, shard_embeddings
from tp_embed.plan import Network, Setup, auto_strategy, cost, costs, recommend
from tp_embed.surgery.options import ShardingOptions
from tp_embed.surgery.plan import plan_sharding


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_auto_is_what_shard_embeddings_takes(tied):
    setup = Setup(12, 6, tied=tied, tp_size=2)
    report = shard_embeddings(Model(setup), FakeGang("cpu", size=2), strategy="auto")
    assert report.tables[0].strategy == auto_strategy(setup)


@pytest.mark.parametrize(("sizes", "tp_size"), [((12, 6), 2), ((12, 6), 4), ((9, 16), 8)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tables_of_models_get_what_the_planner_takes(tied, sizes, tp_size):
    setup = Setup(*sizes, tied=tied, tp_size=tp_size)
    gang = FakeGang("cpu", size=tp_size)
    ((table, strategy), *heads) = plan_sharding(Model(setup), gang, ShardingOptions()).choices
    assert strategy == auto_strategy(setup)
    assert bool(table.heads) == tied
    assert [strategy for _, strategy in heads] == ["vocab"] * (not tied)
    assert auto_strategy(Setup(12, 6, tp_size=4)) == "vocab"  # 18 items, not 24.
    by_columns = ShardingOptions(output="shard")
    ((_, strategy), *_) = plan_sharding(
        Model(Setup(12, 6)), FakeGang("cpu", size=4), by_columns
    ).choices
    assert strategy == "embed"


@pytest.mark.parametrize(
    ("sizes", "tied", "tp_size", "strategy"),
    [
        ((128_000, 4096), False, 8, "embed"),
        ((128_000, 4096), True, 8, "vocab"),
        ((128_000, 4096), False, 1, "embed"),
        ((50_257, 1600), False, 16, "embed"),
        ((10_000_000, 8), False, 16, "vocab"),  # Half of the ranks would hold no column.
        ((10_000_000, 100), False, 8, "embed"),  # Shards of 13 and of 12.5 columns are alike.
        ((2, 1024), False, 8, "embed"),
        ((9, 1024), True, 8, "embed"),  # Two rows on each of five ranks.
    ],
)
def test_auto_takes_the_smaller_shards_or_what_sends_less(sizes, tied, tp_size, strategy):
    setup = Setup(*sizes, tied=tied, tp_size=tp_size)
    others = {"dp_size": 4, "zero_stage": 3, "tokens": 17, "dtype": "fp32", "output": "sequence"}
    for other in (setup, replace(setup, device="cpu"), replace(setup, **others)):
        assert auto_strategy(other) == strategy
    shapes = {
        "vocab": -(-sizes[0] // tp_size) * sizes[1],
        "embed": sizes[0] * -(-sizes[1] // tp_size),
    }
    assert shapes[strategy] <= 1.1 * min(shapes.values())


def test_large_table_takes_what_the_readme_says():
    setup = Setup(2**18, 2**13, head=False, zero_stage=3, grad_dtype="fp32")
    whole = cost(setup, "none")
    assert whole.weight == 4 * 2**30
    assert whole.states == 36 * 2**30
    assert cost(replace(setup, tp_size=8), "vocab").states == 4.5 * 2**30


def test_larger_shards_count_and_empty_ones_do_not():
    setup = Setup(10, 6, head=False, tp_size=4, zero_stage=0, dtype="fp32", optimizer="sgd")
    assert cost(setup, "vocab").weight == 3 * 6 * 4  # 3, 3, 3 and 1 rows.
    assert cost(setup, "embed").weight == 10 * 2 * 4  # 2, 2, 2 and 0 columns.


def test_micro_batches_of_a_step_are_added_up():
    one = Setup(64, 8, tp_size=2, dp_size=2)
    four = replace(one, accumulation_steps=4)
    for stage, times in [(1, 1), (2, 4)]:
        sent = {}
        for setup in (one, four):
            found = cost(replace(setup, zero_stage=stage), "embed")
            for over in ("tp", "dp"):
                sent[setup, over] = sum(t.sent for t in found.transfers if t.over == over)
        weight = 2 * 64 * 4 // 2 * 2  # An all-gather of the new weights, whatever the number.
        assert sent[four, "tp"] == 4 * sent[one, "tp"]
        assert sent[four, "dp"] - weight == times * (sent[one, "dp"] - weight)


def test_ring_is_as_slow_as_its_slowest_link():
    setup = Setup(1000, 8, head=False, tp_size=4, dp_size=2, dtype="fp32", tokens=10)
    gathered, *data_parallel = cost(setup, "embed").transfers
    assert gathered.sent == 3 * 10 * 2 * 4
    one_node = Network(1e9, 1e-6)
    assert one_node.seconds(setup, gathered) == pytest.approx(3e-6 + 240e-9)
    for gpus, slow in [(8, []), (4, data_parallel), (2, [gathered, *data_parallel])]:
        network = Network(1e9, 1e-6, gpus, 1e8, 1e-5)
        for transfer in (gathered, *data_parallel):
            seconds, fast = network.seconds(setup, transfer), one_node.seconds(setup, transfer)
            assert seconds == pytest.approx(10 * fast if transfer in slow else fast)


def test_recommendation_depends_on_what_there_is():
    setup = Setup(2**17, 2**12, tp_size=8)
    found = costs(setup)

    def best(*args):
        chosen, reason = recommend(setup, found, *args)
        return chosen.strategy, chosen.shard_logits, reason

    assert best() == (
        "embed",
        True,
        "sends the least among those that need the least memory",
    )
    # Nothing is sent where tables are whole and there is no other data-parallel rank.
    assert best(None, 1 << 40) == ("none", False, "sends the least among those that fit")
    assert best(Network(1e9), 1 << 40)[2] == "takes the least time to send among those that fit"
    assert best(None, 1.0) == ("embed", True, "needs the least memory, but none fits")
    tied = replace(setup, tied=True)
    chosen, reason = recommend(tied, costs(tied))
    assert (chosen.strategy, chosen.shard_logits) == ("vocab", True)
    assert reason == "sends the least among those that need the least memory"
    assert recommend(tied, [cost(tied, "none"), cost(tied, "vocab")])[1] == (
        "needs the least memory"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` must be an integer greater than or equal to 1"),
        ({"tp_size": 2.0}, "`tp_size` must be an integer greater than or equal to 1"),
        ({"zero_stage": 4}, r"`zero_stage` must be one of \(0, 1, 2, 3\), but is 4"),
        ({"zero_stage": 0}, "`zero_stage` must be 1, 2 or 3 for bf16"),
        ({"dtype": "fp32", "grad_dtype": "bf16"}, "`grad_dtype` must be 'fp32'"),
        ({"optimizer": "lion"}, "`optimizer` must be one of"),
        ({"unique_share": 0}, r"`unique_share` must be in \(0, 1\]"),
        ({"block_unique_share": 1.5}, r"`block_unique_share` must be in \(0, 1\], but is 1.5"),
        ({"owner_share": 0.2, "tp_size": 4}, r"`owner_share` must be in \[1/4, 1\], but is 0.2"),
        ({"output": "shard"}, "`output` must be one of"),
        ({"device": "tpu"}, "`device` must be one of"),
        ({"tied": True, "head": False}, "`tied` must be false where there is no head"),
        ({"sparse": True}, "`sparse` must be false except for an untied table"),
    ],
)
def test_setups_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Setup(**{"vocab_size": 10, "embed_dim": 4} | values)


def test_tables_that_are_not_cut_have_nothing_to_de_duplicate():
    with pytest.raises(ValueError, match="`dedup` must be false for a table that is not cut"):
        cost(Setup(10, 4, tp_size=2), "none", dedup=True)


def test_logits_are_sharded_over_the_vocabulary_only():
    for setup, strategy in [
        (Setup(10, 4, tied=True, tp_size=2), "embed"),
        (Setup(10, 4, tp_size=2), "none"),
        (Setup(10, 4, tp_size=2, shard_head=False), "vocab"),
    ]:
        with pytest.raises(ValueError, match="`shard_logits` must be false"):
            cost(setup, strategy, shard_logits=True)
