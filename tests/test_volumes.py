"""What a forward and a backward send, against what the docstrings state."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from parity import SHARDED
from tp_embed import ProcessGroupGang, StandardEmbedding

KINDS = sorted(SHARDED)


class RecordingGang(ProcessGroupGang):
    """Keeps the operations and the bytes of their tensors."""

    def __init__(self, process_group, device):
        super().__init__(process_group, device)
        self.operations = []

    def _run(self, operation, collective, *tensors):
        self.operations.append((operation, sum(tensor.nbytes for tensor in tensors)))
        super()._run(operation, collective, *tensors)

    def taken(self):
        operations, self.operations = self.operations, []
        return operations


def recorded(gang, kind, num_embeddings, embed_dim, output, dtype):
    gang = RecordingGang(gang.as_process_group(), "cpu")
    sizes = num_embeddings, embed_dim
    SHARDED[kind](gang, *sizes, dtype=dtype, device="meta")
    on_meta = gang.taken()
    SHARDED[kind](gang, *sizes, dtype=dtype)
    by_block = gang.taken()
    SHARDED[kind](gang, *sizes, dtype=dtype, init_fn=lambda e: e.weight.fill_(1.0))
    as_a_whole = gang.taken()
    whole = StandardEmbedding(*sizes, dtype=dtype)
    embed = SHARDED[kind].from_embedding(whole, gang, output=output)
    cut = gang.taken()
    ids = torch.arange(12).view(3, 4) % num_embeddings
    result = embed(ids)
    forward = gang.taken()
    result.sum().backward()
    backward = gang.taken()
    embed.to_embedding()
    return on_meta, by_block, as_a_whole, cut, forward, backward, gang.taken()


def sent(operations, size):
    """The bytes that one rank sends."""
    share = {"all_gather": size - 1, "all_reduce": 2 * (size - 1) / size}
    return sum(share[operation] * nbytes for operation, nbytes in operations)


@pytest.mark.parametrize("sizes", [(24, 12), (11, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_volumes_are_as_documented(pool, dtype, size, sizes):
    (v, e), n, b = sizes, 12, dtype.itemsize
    for kind, output, operation, volume in [
        ("embed", "replicated", "all_gather", (size - 1) * n * -(-e // size)),
        ("embed", "shard", None, 0),
        ("vocab", "replicated", "all_reduce", 2 * (size - 1) / size * n * e),
    ]:
        largest_block = v * -(-e // size) if kind == "embed" else -(-v // size) * e
        for result in pool(size, recorded, kind, *sizes, output, dtype):
            on_meta, by_block, as_a_whole, cut, forward, backward, gathered = result
            assert on_meta == []
            assert by_block == [("broadcast", 8)]
            seed, outcome, table = as_a_whole
            assert seed == ("broadcast", 8)
            assert outcome == ("broadcast_objects", 0)
            assert table == ("broadcast", v * e * b)
            assert cut == []
            assert [name for name, _ in forward] == ([operation] if operation else [])
            assert sent(forward, size) == pytest.approx(volume * b)
            assert backward == []
            assert {name for name, _ in gathered} == {"all_gather"}
            assert sent(gathered, size) == (size - 1) * largest_block * b


def counted_by_torch(gang, kind, output):
    embed = SHARDED[kind](gang, 11, 7, output=output)
    with CommDebugMode() as forward:
        result = embed(torch.tensor([[1, 2, 3]]))
    with CommDebugMode() as backward:
        result.sum().backward()
    assert backward.get_total_counts() == 0
    return {str(name): count for name, count in forward.get_comm_counts().items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_torch_counts_the_same_collectives(pool, size):
    for kind, output, expected in [
        ("embed", "replicated", {"c10d._allgather_base_": 1}),
        ("embed", "shard", {}),
        ("vocab", "replicated", {"c10d.allreduce_": 1}),
    ]:
        wanted = expected if size > 1 else {}
        assert pool(size, counted_by_torch, kind, output) == [wanted] * size
