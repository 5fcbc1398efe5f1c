"""Compares the communication volume of tables with their docstrings."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from parity import SHARDED
from tp_embed import OutputHead, Partition, ProcessGroupGang, StandardEmbedding
from tp_embed.monitor import Traffic

KINDS = sorted(SHARDED)
SIZES = [(24, 12), (11, 7), (3, 2)]
DTYPES = [torch.float32, torch.bfloat16]


class RecordingGang(ProcessGroupGang):
    """Records the operations and the bytes of their tensors."""

    def __init__(self, process_group, device):
        super().__init__(process_group, device)
        self.operations = []

    def _run(self, operation, collective, *tensors):
        self.operations.append((operation, sum(tensor.nbytes for tensor in tensors)))
        super()._run(operation, collective, *tensors)

    def taken(self):
        operations, self.operations = self.operations, []
        return operations


def recorded(gang, kind, num_embeddings, embed_dim, dtype):
    gang = RecordingGang(gang.as_process_group(), "cpu")
    sizes = num_embeddings, embed_dim
    SHARDED[kind](gang, *sizes, dtype=dtype, device="meta")
    on_meta = gang.taken()
    SHARDED[kind](gang, *sizes, dtype=dtype)
    by_block = gang.taken()
    SHARDED[kind](gang, *sizes, dtype=dtype, init_fn=lambda e: e.weight.fill_(1.0))
    as_a_whole = gang.taken()
    embed = SHARDED[kind].from_embedding(StandardEmbedding(*sizes, dtype=dtype), gang)
    cut = gang.taken()
    embed.to_embedding()
    return on_meta, by_block, as_a_whole, cut, gang.taken()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_making_and_gathering_a_table(pool, dtype, size, sizes):
    (v, e), b = sizes, dtype.itemsize
    for kind in KINDS:
        largest_block = v * -(-e // size) if kind == "embed" else -(-v // size) * e
        for result in pool(size, recorded, kind, *sizes, dtype):
            on_meta, by_block, as_a_whole, cut, gathered = result
            assert on_meta == []
            assert by_block == [("broadcast", 8)]
            seed, *outcome, table = as_a_whole
            assert seed == ("broadcast", 8)
            # Whether rank 0 has failed: the sizes of the reports, and the reports.
            assert [name for name, _ in outcome] == ["all_gather"] * (2 if size > 1 else 0)
            assert table == ("broadcast", v * e * b)
            assert cut == []
            assert {name for name, _ in gathered} == {"all_gather"}
            assert sum(nbytes for _, nbytes in gathered) == largest_block * b


IDS = torch.tensor([[0, 1, 2, 1, 1, 0, 2, 2], [9, 2, 2, 8, 2, 1, 0, 1]])


def looked_up(gang, kind, num_embeddings, embed_dim, dtype, output, dedup):
    """Returns the bytes this rank sends in a forward and in a backward, by operation."""
    options = {"dtype": dtype, "output": output, "dedup": dedup, "check_ids": False}
    embed = SHARDED[kind](gang, num_embeddings, embed_dim, **options)
    with Traffic(gang) as forward:
        result = embed(IDS % num_embeddings)
    with Traffic(gang) as backward:
        result.sum().backward()
    return traffic_of(forward), traffic_of(backward)


def traffic_of(traffic):
    return {name: traffic.bytes_sent for name, traffic in traffic.by_operation().items()}


def expected(kind, num_embeddings, embed_dim, output, dedup, rank, size):
    """The same, in items, counted one by one."""
    ids, others = IDS % num_embeddings, [r for r in range(size) if r != rank]
    if output == "shard":
        return {}, {}
    blocks = [ids[:, list(Partition(8, size).shard(r))].flatten().tolist() for r in range(size)]
    all_ids = ids.flatten().tolist()
    wanted = set if dedup else list
    if kind == "embed":
        columns = Partition(embed_dim, size).sizes
        if output == "replicated":
            block = Partition(embed_dim, size).block
            return {"all_gather": (size - 1) * len(wanted(all_ids)) * block}, {}
        forward = sum(len(wanted(blocks[r])) for r in others) * columns[rank]
        backward = len(blocks[rank]) * sum(columns[r] for r in others)
        return {"all_to_all": forward}, {"all_to_all": backward}
    shards = [Partition(num_embeddings, size).shard(r) for r in range(size)]

    def owned(ids, r):
        return [i for i in ids if i in shards[r]]

    if output == "replicated":
        if not dedup:
            return {"all_reduce": Fraction(2 * (size - 1) * len(all_ids) * embed_dim, size)}, {}
        counts = [len(owned(set(all_ids), r)) for r in range(size)]
        total = sum(counts)
        if size == 2 or max(counts) * (size - 1) <= total:
            return {"all_gather": (size - 1) * counts[rank] * embed_dim}, {}
        # Each rank passes on the same number of distinct rows.
        distinct = sorted(set(all_ids))
        parts = [distinct[p.start : p.stop] for p in map(Partition(total, size).shard, range(size))]
        spread = sum(len(owned(parts[r], rank)) for r in others) * embed_dim
        gathered = (size - 1) * len(parts[rank]) * embed_dim
        return {"all_to_all": spread, "all_gather": gathered}, {}
    backward = sum(len(owned(blocks[rank], r)) for r in others) * embed_dim
    if not dedup:
        most = Partition(8, size).block * len(IDS) * size
        forward = {"reduce_scatter": Fraction((size - 1) * most * embed_dim, size)}
    else:
        forward = {"all_to_all": sum(len(owned(set(blocks[r]), rank)) for r in others) * embed_dim}
    return forward, {"all_to_all": backward}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "output"),
    [(kind, output) for kind in KINDS for output in ("replicated", "sequence")]
    + [("embed", "shard")],
)
def test_lookups_send_what_is_documented(pool, kind, output, dtype, size, sizes):
    for dedup in (True, False):
        for rank, seen in enumerate(pool(size, looked_up, kind, *sizes, dtype, output, dedup)):
            wanted = expected(kind, *sizes, output, dedup, rank, size)  # type: ignore[call-arg]
            assert seen == tuple(
                {name: int(items * dtype.itemsize) for name, items in each.items()}
                for each in wanted
            ), (dedup, rank)


def projected(gang, kind, num_embeddings, embed_dim, dtype):
    """Returns the bytes that a head sends of the hidden states of this rank's positions, and of
    their gradient, by operation."""
    embed = SHARDED[kind](gang, num_embeddings, embed_dim, dtype=dtype)
    sent = []
    for layout, length in (("sequence", 7), ("replicated", None)):
        head = OutputHead(embed, input=layout)
        positions = len(Partition(7, gang.size).shard(gang.rank)) if length else 7
        x = torch.randn(2, positions, embed_dim, dtype=dtype, requires_grad=True)
        with Traffic(gang) as forward:
            logits = head(x, length)
        with Traffic(gang) as backward:
            logits.backward(torch.ones_like(logits))
        sent.append([traffic_of(each) for each in (forward, backward)])
    return sent


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_send_what_is_documented(pool, dtype, size, sizes):
    (_, e), b, block = sizes, dtype.itemsize, 2 * Partition(7, size).block
    for [cut_forward, cut_backward], [forward, backward] in pool(
        size, projected, "vocab", *sizes, dtype
    ):
        states = (size - 1) * block * e * b
        # The logits are gathered in both; the sum of gradients becomes a reduce-scatter.
        assert cut_forward == {"all_gather": states + forward["all_gather"]}
        assert cut_backward == {"reduce_scatter": states}
        assert backward == {"all_reduce": 2 * (size - 1) * 14 * e * b // size}
    for [cut_forward, cut_backward], [forward, backward] in pool(
        size, projected, "embed", *sizes, dtype
    ):
        states = (size - 1) * block * Partition(e, size).block * b
        assert cut_forward == {"all_to_all": states, **forward}
        assert cut_backward == {"all_to_all": states}
        assert backward == {"all_gather": (size - 1) * 14 * Partition(e, size).block * b}


def sent_by(gang, kind, dedup):
    embed = SHARDED[kind](gang, 100, 64, dedup=dedup, check_ids=False)
    ids = torch.arange(50) % 10  # A fifth of the ids is distinct.
    with Traffic(gang) as traffic:
        embed(ids)
    return traffic.total().bytes_sent


@pytest.mark.parametrize("kind", KINDS)
def test_auto_sends_distinct_rows_where_there_are_few(pool, kind):
    auto, yes, no = (pool(2, sent_by, kind, dedup) for dedup in ("auto", True, False))
    assert auto == yes
    assert sum(yes) < 0.21 * sum(no)


def counted_by_torch(gang, kind, output, dedup):
    embed = SHARDED[kind](gang, 11, 7, output=output, dedup=dedup, check_ids=False)
    with CommDebugMode() as forward:
        result = embed(torch.tensor([[1, 2, 3, 1]]))
    with CommDebugMode() as backward:
        result.sum().backward()
    counts = forward.get_comm_counts(), backward.get_comm_counts()
    return [{str(name): count for name, count in each.items()} for each in counts]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_torch_counts_the_same_collectives(pool, size):
    gather, exchange = {"c10d._allgather_base_": 1}, {"c10d.alltoall_base_": 1}
    for kind, output, dedup, *wanted in [
        ("embed", "replicated", False, gather, {}),  # Few bytes, in one round.
        ("embed", "shard", False, {}, {}),
        ("embed", "sequence", True, exchange, exchange),
        ("vocab", "replicated", False, {"c10d.allreduce_": 1}, {}),
        ("vocab", "sequence", False, {"c10d._reduce_scatter_base_": 1}, exchange),
    ]:
        assert (
            pool(size, counted_by_torch, kind, output, dedup)
            == [wanted if size > 1 else [{}, {}]] * size
        )
