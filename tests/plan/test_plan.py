"""The planner against what layers do: what they send, and what they need of memory."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy

from tp_embed import FakeGang, ShardedEmbedding, VocabShardedEmbedding, shard_embeddings
from tp_embed.monitor import Traffic
from tp_embed.nn import loss as sharded_loss
from tp_embed.partition import Partition
from tp_embed.plan import Network, Setup, auto_strategy, cost, costs, recommend
from tp_embed.plan.lookups import auto_dedup
from tp_embed.plan.tokens import distinct, distinct_of_block, zipf_distinct
from tp_embed.surgery.options import ShardingOptions
from tp_embed.surgery.plan import plan_sharding

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


def sharded(gang, setup, strategy, shard_logits, dedup):
    """The model, and what gives logits and loss, as those of transformers do."""
    model = Model(setup)
    shard_embeddings(model, gang, strategy=strategy, output=setup.output, check_ids=False)
    if strategy != "none":
        model.embed.dedup = dedup
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
    return [(found.strategy, found.shard_logits, found.dedup) for found in costs(setup)]


def rows_of_owners(setup, count):
    """As many distinct rows of the table, of which the first ranks have no more than others, or the
    first one its share."""
    partition = Partition(setup.vocab_size, setup.tp_size)
    left = [list(partition.shard(rank)) for rank in range(setup.tp_size)]
    found = []
    if setup.owner_share is not None:
        found = [left[0].pop(0) for _ in range(math.ceil(setup.owner_share * count))]
        left = left[1:]
    while len(found) < count:
        found += [rows.pop(0) for rows in reversed(left) if rows]
    return found[:count]


def ids_of(setup, lengths=None):
    """Ids in blocks of these lengths, or in one: each repeats so many as are planned for it."""
    ids = []
    for length in lengths or [setup.tokens]:
        share = setup.block_unique_share if lengths else setup.unique_share
        rows = rows_of_owners(setup, min(math.ceil(share * length), setup.vocab_size))
        ids += [rows[i % len(rows)] for i in range(length)]
    return torch.tensor(ids)


def recorded(gang, train):
    """What this rank puts into collectives: phase, operation and bytes, in their order. ``train``
    calls what it is given between forward and backward."""
    sent, phase = [], "forward"

    def record(operation, tensors):
        sent.append((phase, operation, sum(tensor.nbytes for tensor in tensors)))
        return nullcontext()

    def turn():
        nonlocal phase
        phase = "backward"

    with gang.register_collective_hook(record), Traffic(gang) as traffic:
        train(turn)
    return sent, traffic.total().bytes_sent


def most(of_ranks):
    """Of each collective the most that a rank puts in. All ranks call the same."""
    for row in zip(*of_ranks, strict=True):
        ((phase, operation),) = {found[:2] for found in row}
        yield phase, operation, max(found[2] for found in row)


def counted(gang, setup):
    """What :func:`recorded` gives of a model with its head, by strategy."""
    found = []
    for case in cases(setup):
        model, loss = sharded(gang, setup, *case)
        ids = ids_of(setup)

        def train(turn, model=model, loss=loss, ids=ids):
            _, result = loss(model.embed(ids), ids)
            turn()
            result.backward()

        found.append(recorded(gang, train)[0])
    return found


@pytest.mark.parametrize("sizes", [(24, 12), (11, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_layers_send_what_is_planned(pool, tied, sizes):
    for size, dtype, share in [(2, "fp32", 0.8), (3, "bf16", 0.3), (4, "fp32", 0.8)]:
        setup = Setup(*sizes, tied=tied, tp_size=size, dtype=dtype, tokens=10, unique_share=share)
        of_ranks = pool(size, counted, setup)
        for i, planned in enumerate(costs(setup)):
            wanted = [(t.phase, t.operation, t.payload) for t in planned.transfers]
            assert list(most([of_rank[i] for of_rank in of_ranks])) == wanted, planned


def looked_up(gang, setup, strategy, dedup):
    """What :func:`recorded` gives of a lookup and its gradient."""
    kind = ShardedEmbedding if strategy == "embed" else VocabShardedEmbedding
    embed = kind(
        gang,
        setup.vocab_size,
        setup.embed_dim,
        dtype=DTYPES[setup.dtype],
        output=setup.output,
        dedup=dedup,
        check_ids=False,
    )
    lengths = Partition(setup.tokens, gang.size).sizes if setup.output == "sequence" else None
    ids = ids_of(setup, lengths)

    def train(turn):
        output = embed(ids)
        turn()
        output.sum().backward()

    return recorded(gang, train)


@pytest.mark.parametrize("output", ["replicated", "sequence"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("more", "share", "owner"),
    [(0, 1.0, None), (0, 0.5, None), (-3, 1.0, None), (0, 0.5, 0.75), (0, 1.0, 1.0)],
    ids=["distinct", "half", "uneven", "one owner of most", "one owner"],
)
def test_lookups_send_what_is_planned(pool, more, share, owner, size, output):
    for sizes, dtype in [((160, 12), "fp32"), ((157, 7), "bf16")]:
        setup = Setup(
            *sizes,
            head=False,
            tp_size=size,
            dtype=dtype,
            tokens=max(16, 2 * size**2) + more,
            unique_share=share if output == "replicated" else 1.0,
            block_unique_share=share,
            owner_share=owner,
            output=output,
            device="cpu",
        )
        for strategy, _, dedup in cases(setup):
            if strategy == "none":
                continue
            planned = cost(setup, strategy, dedup=dedup)
            found = pool(size, looked_up, setup, strategy, dedup)
            wanted = [(t.phase, t.operation, t.payload) for t in planned.transfers]
            assert list(most([sent for sent, _ in found])) == wanted, (strategy, dedup)
            # The busiest rank of one collective may not be that of the next.
            assert max(total for _, total in found) <= planned.sent
            if len(wanted) == 1:
                assert max(total for _, total in found) == int(planned.sent)


def scattered(gang, setup):
    """What DTensor counts where a model keeps its block of a replicated lookup."""
    mesh = DeviceMesh.from_group(gang.as_process_group(), "cpu")
    x = DTensor.from_local(
        torch.ones(setup.tokens, setup.embed_dim, requires_grad=True), mesh, [Replicate()]
    )
    counts = []
    with CommDebugMode() as forward:
        block = x.redistribute(mesh, [Shard(0)])
    counts.append(forward.get_total_counts())
    with CommDebugMode() as backward:
        block.to_local().sum().backward()
    counts.append({str(name): n for name, n in backward.get_comm_counts().items()})
    return counts


def test_tables_that_are_whole_send_what_dtensor_does(pool):
    setup = Setup(64, 8, head=False, tp_size=4, tokens=12, output="sequence", dtype="fp32")
    (found,) = cost(setup, "none").transfers
    assert (found.phase, found.operation, found.payload) == ("backward", "all_gather", 3 * 8 * 4)
    expected = [0, {"c10d_functional.all_gather_into_tensor": 1}]
    assert pool(4, scattered, setup) == [expected] * 4
    assert not cost(replace(setup, output="replicated"), "none").transfers


def sent_by_itself(gang, setup):
    """The bytes of a forward with what ``dedup`` is by default, by strategy."""
    found = {}
    for name, kind in (("embed", ShardedEmbedding), ("vocab", VocabShardedEmbedding)):
        sizes = setup.vocab_size, setup.embed_dim
        embed = kind(gang, *sizes, output=setup.output, check_ids=False)
        lengths = Partition(setup.tokens, gang.size).sizes if setup.output == "sequence" else None
        with Traffic(gang) as traffic:
            embed(ids_of(setup, lengths))
        found[name] = traffic.total().bytes_sent
    return found


@pytest.mark.parametrize("output", ["replicated", "sequence"])
@pytest.mark.parametrize("share", [0.5, 0.85, 0.9])
def test_layers_decide_as_planned_whether_to_de_duplicate(pool, share, output):
    setup = Setup(
        80,
        8,
        head=False,
        tp_size=2,
        tokens=40,
        dtype="fp32",
        unique_share=share if output == "replicated" else 1.0,
        block_unique_share=share,
        output=output,
        device="cpu",
    )
    of_ranks = pool(2, sent_by_itself, setup)
    for strategy in ("embed", "vocab"):
        nbytes = max(sent[strategy] for sent in of_ranks)
        dedup = auto_dedup(setup, strategy)
        assert dedup == (strategy == "vocab" or share < 0.9)
        transfers = cost(setup, strategy, dedup=dedup).transfers
        assert nbytes == sum(t.sent for t in transfers if t.phase == "forward")
        assert not auto_dedup(replace(setup, device="cuda"), strategy)


def test_zipf_is_what_draws_by_it_give():
    generator = torch.Generator().manual_seed(0)
    for vocab_size, tokens in [(1, 5), (50, 20), (3000, 4000), (200_000, 8192)]:
        chances = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
        exact = (1 - (1 - chances / chances.sum()) ** tokens).sum().item()
        assert zipf_distinct(vocab_size, tokens) == pytest.approx(exact, rel=1e-4)
        drawn = torch.multinomial(chances, tokens, replacement=True, generator=generator)
        assert len(drawn.unique()) == pytest.approx(exact, rel=0.1, abs=2)


def test_blocks_have_as_many_distinct_tokens_as_text_of_their_length():
    setup = Setup(200_000, 8, tp_size=4, tokens=8192, unique_share=0.14, output="sequence")
    whole = distinct(setup)
    assert whole == math.ceil(0.14 * 8192)
    counts = [distinct_of_block(setup, n) for n in (0, 1, 2, 2048, 8192)]
    assert counts[:2] == [0, 1]
    assert counts[-1] == whole
    assert counts == sorted(counts)
    # What a BPE of 32k makes of Python's source: 0.23 of 2k tokens, 0.14 of 8k.
    assert counts[3] / 2048 == pytest.approx(0.23, abs=0.05)
    assert distinct_of_block(replace(setup, block_unique_share=0.2), 2048) == math.ceil(0.2 * 2048)
    # No more than there are in all.
    assert distinct_of_block(replace(setup, block_unique_share=1.0), 2048) == whole


def needed(gang, setup, *case):
    """The most bytes beside Parameters and their gradients: of the lookup, and of head and loss."""
    model, loss = sharded(gang, setup, *case)
    ids = ids_of(setup)
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
    lookup = Setup(300, 1024, tied=True, tp_size=4, dtype=dtype, tokens=100, unique_share=0.5)
    indices = 8 * (lookup.tp_size + 4) * lookup.tokens
    for case in cases(lookup):
        for exchange, _ in pool(4, needed, lookup, *case):
            assert 0 <= exchange - cost(lookup, *case).exchange <= indices
    head = replace(lookup, vocab_size=20_000, embed_dim=8)
    for case in cases(head):
        for _, logits in pool(4, needed, head, *case):
            assert logits == pytest.approx(cost(head, *case).logits, rel=0.05)


def needed_by_blocks(gang, setup, strategy, dedup):
    """The most bytes of a lookup with sequence output beside its Parameter."""
    kind = ShardedEmbedding if strategy == "embed" else VocabShardedEmbedding
    dtype = DTYPES[setup.dtype]
    embed = kind(
        gang, setup.vocab_size, setup.embed_dim, dtype=dtype, output="sequence", dedup=dedup
    )
    ids, tracker = ids_of(setup, Partition(setup.tokens, gang.size).sizes), MemTracker()
    with tracker:
        embed(ids)
    (sizes,) = tracker.get_tracker_snapshot("peak").values()
    by_kind = {str(kind).split(".")[-1]: nbytes for kind, nbytes in sizes.items()}
    return by_kind["Total"] - by_kind["PARAM"]


@pytest.mark.parametrize("sizes", [(300, 1024), (299, 1023)], ids=["even", "uneven"])
def test_lookups_of_blocks_need_what_is_planned(pool, sizes):
    setup = Setup(
        *sizes, head=False, tp_size=4, dtype="fp32", tokens=128, output="sequence", device="cpu",
        unique_share=0.125, block_unique_share=0.5,
    )  # fmt: skip
    indices = 8 * (setup.tp_size + 12) * setup.tokens
    for strategy, _, dedup in cases(setup)[1:]:
        most_needed = max(pool(4, needed_by_blocks, setup, strategy, dedup))
        planned = cost(setup, strategy, dedup=dedup).exchange
        assert 0 <= most_needed - planned <= indices, (strategy, dedup)


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
