"""What ranks with ids of their own send, and how they fail together."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from tp_embed import GangError, RowWiseEmbedding
from tp_embed.monitor import Traffic
from tp_embed.parameter.sharded import local

V, E = 20, 5


def error_of(gang, ids, placement):
    embed = RowWiseEmbedding(gang, V, E, placement=placement)
    try:
        embed(ids[gang.rank])
    except (IndexError, GangError) as e:
        error = f"{type(e).__name__}: {e}"
    assert embed(torch.tensor([gang.rank])).shape == (1, E)  # Works again.
    return error


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bad", [-1, V, 2**31 - 1])
@pytest.mark.parametrize("placement", ["block", "cyclic"])
def test_a_bad_id_on_one_rank_raises_on_all(pool, size, bad, placement):
    ids = [torch.zeros(0, dtype=torch.long), torch.tensor([[1, 2], [3, bad]]), torch.arange(4)]
    errors = pool(size, error_of, ids, placement)
    assert len(set(errors)) == 1
    assert "IndexError: All ids in `x` must be in [0, 20) (num_embeddings)" in errors[0]
    assert f"the id at position (1, 1) is {bad} instead, on ProcessGroupGang(rank=1" in errors[0]


def other_tables(gang):
    tables = [RowWiseEmbedding(gang, V + n, E) for n in range(2)]
    with pytest.raises(GangError, match="must do the same lookups in the same order"):
        tables[gang.rank // 2](torch.arange(3))


def test_ranks_that_look_up_different_tables_raise(pool):
    pool(4, other_tables)


def sent(gang, placement, dedup):
    embed = RowWiseEmbedding(gang, V, E, placement=placement, dedup=dedup)
    ids = torch.randint(V, (30,), generator=torch.Generator().manual_seed(gang.rank))
    with Traffic(gang) as forward, CommDebugMode() as counted:
        output = embed(ids)
    with Traffic(gang) as backward, CommDebugMode() as counted_back:
        output.sum().backward()
    calls = [sum(mode.get_comm_counts().values()) for mode in (counted, counted_back)]
    bytes_sent = [sum(t.bytes_sent for t in x.by_operation().values()) for x in (forward, backward)]
    return ids, calls, bytes_sent, list(embed.rows)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dedup", ["auto", False])
def test_volumes(pool, size, dedup):
    for placement in ("block", "cyclic"):
        results = pool(size, sent, placement, dedup)
        for rank, (ids, calls, bytes_sent, rows) in enumerate(results):
            wanted = list if dedup is False else set
            own = [i for i in wanted(ids.tolist()) if i not in rows]
            others = [wanted(r[0].tolist()) for k, r in enumerate(results) if k != rank]
            given = [i for ids_of_other in others for i in ids_of_other if i in rows]
            assert calls == [3, 1]
            headers = 32 * (size - 1)
            assert bytes_sent[0] == headers + 4 * len(own) + 4 * E * len(given)
            assert bytes_sent[1] == 4 * E * len(own)


def behind_ddp(gang):
    model = torch.nn.Sequential(RowWiseEmbedding(gang, V, E), torch.nn.Linear(E, 1))
    wrapped = DistributedDataParallel(model, process_group=gang.as_process_group())
    with pytest.raises(ValueError, match="must not average the weight of a table"):
        wrapped(torch.arange(3))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
    wrapped = DistributedDataParallel(model, process_group=gang.as_process_group())
    wrapped(torch.arange(gang.rank, 5)).sum().backward()
    grad = local(model[0].weight.grad)
    # Each row counts the ranks that look it up.
    counts = [sum(r <= row < 5 for r in range(gang.size)) for row in model[0].rows]
    expected = torch.tensor(counts)[:, None] * model[1].weight.detach()
    torch.testing.assert_close(grad, expected)


def test_data_parallel_wrappers_leave_the_table_out(pool):
    pool(2, behind_ddp)


def compiled(gang, dedup):
    embed = RowWiseEmbedding(gang, V, E, 3, placement="cyclic", dedup=dedup, scale=2.0)
    ids = torch.arange(gang.rank, gang.rank + 4)
    run = torch.compile(lambda x: embed(x).pow(2).sum(), backend="aot_eager", fullgraph=True)
    grads = []
    for function in (lambda x: embed(x).pow(2).sum(), run):
        embed.weight.grad = None
        function(ids).backward()
        grads.append(local(embed.weight.grad).clone())
    return torch.equal(*grads)


@pytest.mark.parametrize("dedup", [True, False])
def test_compiled(pool, dedup):
    assert all(pool(2, compiled, dedup, timeout=180))
