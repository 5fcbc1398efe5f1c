"""What a table in memory-mapped files refuses, and what it says."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from test_crashes import E, V, make
from test_map_table import train
from torch import nn

from tp_embed import (
    FakeGang,
    GangError,
    OutputHead,
    RowWiseEmbedding,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
    map_table,
)
from tp_embed.optim import LazyAdam, RowwiseAdagrad


def meta(kind=VocabShardedEmbedding, gang=None, v=V, e=E, **options):
    gang = gang or FakeGang("cpu")
    return kind(gang, v, e, **{"sparse": True, "device": "meta", **options})


@pytest.fixture
def mapped_table(tmp_path):
    table = meta()
    with map_table(table, tmp_path / "table") as mapped:
        yield table, mapped


def test_which_tables(tmp_path):
    with pytest.raises(TypeError, match=r"must be a `RowWiseEmbedding`, .* Shard it by 'vocab'"):
        map_table(meta(ShardedEmbedding), tmp_path)
    with pytest.raises(TypeError, match="but is a `Embedding`"):
        map_table(nn.Embedding(3, 4), tmp_path)
    with pytest.raises(ValueError, match="`sparse` must be True"):
        map_table(meta(sparse=False), tmp_path)
    with pytest.raises(ValueError, match="must be on the CPU, but is on 'cuda'"):
        map_table(meta(gang=FakeGang("cuda")), tmp_path)
    with pytest.raises(ValueError, match="`resident` must be at least 1"):
        map_table(meta(), tmp_path, resident=0)
    apart = meta()
    apart.set_apart()
    with pytest.raises(ValueError, match="set apart already"):
        map_table(apart, tmp_path)


def test_moves_casts_and_copies(mapped_table, tmp_path):
    table, _ = mapped_table
    before = table.weight.detach().clone()
    model = nn.Sequential(table, nn.Linear(E, 3))
    with pytest.raises(ValueError, match=r"must stay torch.float32 on 'cpu', but would become tor"):
        model.bfloat16()
    with pytest.raises(ValueError, match="on 'meta'"):
        model.to("meta")
    with pytest.raises(ValueError, match="must not be copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match="must not be copied or pickled"):
        torch.save(model, io.BytesIO())
    with pytest.raises(ValueError, match="is assigned another Parameter"):
        table.weight = nn.Parameter(torch.zeros(V, E))
    with pytest.raises(RuntimeError, match="is assigned another Parameter"):
        table.load_state_dict({"weight": torch.zeros(V, E)}, assign=True)
    with pytest.raises(ValueError, match="`sparse` must be True"):
        table.sparse = False
    table.sparse = True
    with pytest.raises(ValueError, match="must not be mapped or set apart already"):
        map_table(table, tmp_path / "second")
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_head_of_the_table(device, tmp_path):
    table = meta(device=device)
    head, linear = OutputHead(table), OutputHead(meta(v=V, device="cpu", sparse=False))
    with map_table(table, tmp_path):
        for use in (head, head.loss):
            with pytest.raises(ValueError, match=r"whose gradients must be sparse. Leave it unt"):
                use(torch.ones(2, E), *([] if use is head else [torch.zeros(2).long()]))
        with pytest.raises(ValueError, match=r"whose gradients must be sparse. Leave it untied"):
            linear.weight = table.weight


def test_optimizers(mapped_table):
    table, _ = mapped_table
    for other in (torch.optim.SGD, torch.optim.SparseAdam):
        table(torch.arange(3)).sum().backward()
        with pytest.raises(ValueError, match=f"`tp_embed.optim`.* is a `{other.__name__}`"):
            other([table.weight], lr=0.1).step()
    optimizer = RowwiseAdagrad([table.weight])
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"States that are loaded .* `MappedTable.restore"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="Copies of an optimizer"):
        copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"must be a `RowwiseAdagrad`, .* but is a `LazyAdam`"):
        LazyAdam([table.weight]).step()
    table.weight.data = table.weight.detach().clone()
    with pytest.raises(ValueError, match="must stay in them, but was replaced"):
        optimizer.step()


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: meta(v=V + 1), f"'num_embeddings': {V + 1}}}, but has one with .*: {V}}}"),
        (lambda: meta(e=E + 1), "'embed_dim': 7"),
        (lambda: meta(dtype=torch.bfloat16), "'dtype': 'torch.bfloat16'"),
        (lambda: meta(RowWiseEmbedding, placement="cyclic"), "'placement': 'cyclic'"),
    ],
)
def test_files_of_another_table(other, match, tmp_path):
    map_table(meta(), tmp_path).close()
    with pytest.raises(ValueError, match=match):
        map_table(other(), tmp_path)
    map_table(StandardEmbedding(V, E, sparse=True), tmp_path).close()


def of_three_ranks(gang, directory):
    with pytest.raises((ValueError, GangError), match=r"over 3 ranks, but has \['rank-0-of-1'\]"):
        map_table(meta(gang=gang), directory)


def test_files_of_another_number_of_ranks(pool, tmp_path):
    map_table(meta(), tmp_path).close()
    pool(3, of_three_ranks, str(tmp_path))


def test_files_that_are_in_use_or_closed(tmp_path):
    table = meta()
    mapped = map_table(table, tmp_path)
    with pytest.raises(ValueError, match="must not be open, but is, in another process or in this"):
        map_table(meta(), tmp_path)
    mapped.close()
    mapped.close()
    with pytest.raises(ValueError, match="must be open to use it, but are closed"):
        table(torch.arange(3))
    map_table(meta(), tmp_path).close()


def test_files_after_the_machine_has_stopped(tmp_path):
    """Here another boot id stands for a restart."""
    table = meta()
    mapped = map_table(table, tmp_path)
    optimizer = RowwiseAdagrad([table.weight])
    mapped.flush()
    unsaved = mapped.path / "unsaved"
    assert not unsaved.exists()
    train(table, optimizer, "vocab", 0, range(1))
    assert unsaved.exists()
    unsaved.write_text("another boot")
    mapped._store.close()  # As a process that is killed.
    with pytest.raises(ValueError, match=r"since the last `flush\(\)`. Delete the directory"):
        map_table(meta(), tmp_path)


def test_snapshots(tmp_path, mapped_table):
    _, mapped = mapped_table
    with pytest.raises(ValueError, match="must hold a snapshot of this table, but has none"):
        mapped.restore(tmp_path / "none")
    larger = meta(v=V + 1)
    with map_table(larger, tmp_path / "other") as other:
        other.snapshot(tmp_path / "saved")
    with pytest.raises(ValueError, match="must be open, but was closed"):
        other.snapshot(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"a snapshot of a table with {'num_embeddings': 41}"):
        mapped.restore(tmp_path / "saved")
    assert mapped.step == 0
    with pytest.raises(ValueError, match="must not hold a table in use, but does"):
        mapped.snapshot(tmp_path / "table")
    with pytest.raises(ValueError, match="must hold a table in use, but has a snapshot"):
        map_table(meta(v=V + 1), tmp_path / "saved")
    assert (tmp_path / "saved" / "rank-0-of-1" / "weight.bin").exists()


def of_other_ranks(gang, directory):
    table, mapped, optimizer = make(gang, "block", "lazy_adam", torch.float32, Path(directory))
    train(table, optimizer, "block", gang.rank, range(3))
    mapped.close()
    own = mapped.path
    if gang.rank == 0:
        own.rename(own.with_name("away"))
    with pytest.raises(GangError, match=r"the ranks \[0\] are new, while the steps are \[0, 3\]"):
        make(gang, "block", "lazy_adam", torch.float32, Path(directory))
    if gang.rank == 0:
        for file in own.iterdir():
            file.unlink()
        own.rmdir()
        own.with_name("away").rename(own)
    table, mapped, optimizer = make(gang, "block", "lazy_adam", torch.float32, Path(directory))
    if gang.rank == 0:  # Two steps that the other rank has not.
        for _ in range(2):
            optimizer.step(grads={table.weight: torch.zeros(table.weight.shape).to_sparse(1)})
    mapped.close()
    with pytest.raises(GangError, match=r"at the same step, or one apart, but .* \[5, 3\]"):
        make(gang, "block", "lazy_adam", torch.float32, Path(directory))


def test_ranks_that_have_other_steps(pool, tmp_path):
    pool(2, of_other_ranks, str(tmp_path))
