"""The planner against what layers do: what they send, and whether they de-duplicate."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from plan_models import DTYPES, cases, ids_of, sharded
from tp_embed import ShardedEmbedding, VocabShardedEmbedding
from tp_embed.monitor import Traffic
from tp_embed.partition import Partition
from tp_embed.plan import Setup, cost, costs
from tp_embed.plan.lookups import auto_dedup
from tp_embed.plan.tokens import distinct, distinct_of_block, zipf_distinct


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
            # Another rank may be the busiest in the next collective.
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
