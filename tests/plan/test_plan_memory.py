"""The planner against the memory that layers need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from plan_models import DTYPES, Model, cases, ids_of, sharded
from tp_embed import FakeGang, ShardedEmbedding, VocabShardedEmbedding, shard_embeddings
from tp_embed.partition import Partition
from tp_embed.plan import Setup, cost


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


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("sizes", [(20_000, 64, 512), (3000, 256, 1024), (20_000, 8, 100)])
def test_fused_losses_need_at_most_what_is_planned(sizes, dtype):
    vocab_size, width, tokens = sizes
    setup = Setup(
        vocab_size, width, tied=True, tp_size=4, dtype=dtype, tokens=tokens, unique_share=0.5,
        device="cpu", fuse_loss=True,
    )  # fmt: skip
    for strategy in ("embed", "vocab"):
        gang = FakeGang("cpu", rank=0, size=4)
        _, found = needed(gang, setup, strategy, False, False)
        planned = cost(setup, strategy).logits
        assert 0.3 * planned <= found <= planned


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
