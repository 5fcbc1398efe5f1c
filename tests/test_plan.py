"""The planner against what layers do: what they send, and what they need of memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import cross_entropy

from tp_embed import FakeGang, ShardedEmbedding, VocabShardedEmbedding, shard_embeddings
from tp_embed import loss as sharded_loss
from tp_embed.plan import Network, Setup, auto_strategy, cost, costs, recommend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(nn.Module):
    """A table and its head, with nothing between them."""

    def __init__(self, setup):
        super().__init__()
        rows, columns, dtype = setup.vocab_size, setup.embed_dim, DTYPES[setup.dtype]
        device = "meta" if setup.tied else None
        self.embed = nn.Embedding(rows, columns, dtype=dtype)
        self.head = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)
        if setup.tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head


def sharded(gang, setup, strategy, shard_logits):
    """The model, and what gives logits and loss, as those of transformers do."""
    model = Model(setup)
    shard_embeddings(model, gang, strategy=strategy)
    if shard_logits:
        model.head.output = "shard"

    def loss(x, target):
        logits = model.head(x)
        if shard_logits:
            found = sharded_loss.cross_entropy(logits, target, gang, model.head.partition)
        else:
            found = cross_entropy(logits.float(), target)
        return logits, found

    return model, loss


def cases(setup):
    return [(found.strategy, found.shard_logits) for found in costs(setup)]


def counted(gang, setup):
    """What a rank puts into collectives: phase, operation and bytes, by strategy."""
    seen = {case: [] for case in cases(setup)}
    for case, sent in seen.items():
        model, loss = sharded(gang, setup, *case)
        ids = torch.arange(setup.tokens) % setup.vocab_size
        phase = "forward"

        def record(operation, tensors, sent=sent):
            sent.append((phase, operation, sum(tensor.nbytes for tensor in tensors)))  # noqa: B023
            return nullcontext()

        with gang.register_collective_hook(record):
            _, found = loss(model.embed(ids), ids)
            phase = "backward"
            found.backward()
    return seen


@pytest.mark.parametrize("sizes", [(24, 12), (11, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_layers_send_what_is_planned(pool, tied, sizes):
    for size, dtype in [(2, "fp32"), (3, "bf16"), (4, "fp32")]:
        setup = Setup(*sizes, tied=tied, tp_size=size, dtype=dtype, tokens=10)
        planned = {
            (found.strategy, found.shard_logits): [
                (t.phase, t.operation, t.payload) for t in found.transfers
            ]
            for found in costs(setup)
        }
        assert planned["vocab", False]
        assert pool(size, counted, setup) == [planned] * size


def needed(gang, setup, strategy, shard_logits):
    """The most bytes beside Parameters and their gradients: of the lookup, and of head and loss."""
    model, loss = sharded(gang, setup, strategy, shard_logits)
    ids = torch.arange(setup.tokens) % setup.vocab_size
    x = torch.randn(setup.tokens, setup.embed_dim, dtype=DTYPES[setup.dtype], requires_grad=True)

    def train():
        logits, found = loss(x, ids)
        found.backward()
        return logits  # Which a model of transformers gives to its caller.

    found = []
    for function in (lambda: model.embed(ids), train):
        tracker = MemTracker()
        with tracker:
            function()
        (sizes,) = tracker.get_tracker_snapshot("peak").values()
        by_kind = {str(kind).split(".")[-1]: nbytes for kind, nbytes in sizes.items()}
        found.append(by_kind["Total"] - by_kind["PARAM"] - by_kind["GRAD"])
    return found


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_lookups_and_losses_need_what_is_planned(pool, dtype):
    lookup = Setup(300, 1024, tied=True, tp_size=4, dtype=dtype, tokens=100)
    for case in cases(lookup):
        for exchange, _ in pool(4, needed, lookup, *case):
            indices = 17 * lookup.tokens  # Of rows, and which are another rank's.
            assert 0 <= exchange - cost(lookup, *case).exchange <= indices
    head = Setup(20_000, 8, tied=True, tp_size=4, dtype=dtype, tokens=100)
    for case in cases(head):
        for _, logits in pool(4, needed, head, *case):
            assert logits == pytest.approx(cost(head, *case).logits, rel=0.02)


def built(setup, strategy):
    """The peak of the bytes as a model is built and then sharded; as a table is built in shards."""
    gang = FakeGang("cpu", size=setup.tp_size)
    whole, shards = MemTracker(), MemTracker()
    with whole:
        model = Model(setup)
        shard_embeddings(model, gang, strategy=strategy)
    kind = ShardedEmbedding if strategy == "embed" else VocabShardedEmbedding
    with shards:
        embed = kind(gang, setup.vocab_size, setup.embed_dim, dtype=DTYPES[setup.dtype])
    del model, embed
    return [t.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] for t in (whole, shards)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_building_needs_what_is_planned(strategy, tied):
    setup = Setup(4000, 300, tied=tied, tp_size=3, tokens=1)
    whole, _ = built(setup, strategy)
    small = 1 << 14  # Samples of the tables, for a checksum.
    assert 0 <= whole - cost(setup, strategy).init_whole <= small
    _, shards = built(setup, strategy)
    tile = 256 * 128 * 4
    assert 0 <= shards - cost(replace(setup, tied=True), strategy).init_sharded <= 2 * tile


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_auto_is_what_shard_embeddings_takes(tied):
    setup = Setup(12, 6, tied=tied, tp_size=2)
    report = shard_embeddings(Model(setup), FakeGang("cpu", size=2), strategy="auto")
    assert report.tables[0].strategy == auto_strategy(setup)


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
        "of those that need the least memory it sends the least",
    )
    # Nothing is sent where tables are whole and there is no other data-parallel rank.
    assert best(None, 1 << 40) == ("none", False, "of those that fit it sends the least")
    assert best(Network(1e9), 1 << 40)[2] == "of those that fit it takes the least time to send"
    assert best(None, 1.0) == ("embed", True, "none fits; it needs the least memory")
    tied = replace(setup, tied=True)
    chosen, reason = recommend(tied, costs(tied))
    assert (chosen.strategy, chosen.shard_logits) == ("vocab", True)
    assert reason == "it needs the least memory"


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
        ({"tied": True, "head": False}, "`tied` must be false where there is no head"),
        ({"sparse": True}, "`sparse` must be false but for a table"),
    ],
)
def test_setups_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Setup(**{"vocab_size": 10, "embed_dim": 4} | values)


def test_logits_are_sharded_over_the_vocabulary_only():
    for setup, strategy in [
        (Setup(10, 4, tied=True, tp_size=2), "embed"),
        (Setup(10, 4, tp_size=2), "none"),
        (Setup(10, 4, tp_size=2, shard_head=False), "vocab"),
    ]:
        with pytest.raises(ValueError, match="`shard_logits` must be false"):
            cost(setup, strategy, shard_logits=True)
