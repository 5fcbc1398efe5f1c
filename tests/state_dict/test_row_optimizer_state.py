"""State dicts and files of tables with row optimizers, resharded between any two gangs."""

from __future__ import annotations

import copy
import resource
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tp_embed import (
    GangError,
    RowWiseEmbedding,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.checkpoint import (
    CheckpointError,
    ReadOptions,
    Request,
    convert,
    hook_state_dict,
    read,
)
from tp_embed.checkpoint.contents import ROW_STATES
from tp_embed.checkpoint.table_files import SavedTable, save_tables
from tp_embed.checkpoint.table_loading import TableLoader
from tp_embed.optim import LazyAdam, RowwiseAdagrad, RowwiseAdam
from tp_embed.parameter.sharded import local

V, E, LR = 13, 6, 0.1
KINDS: dict[str, Any] = {
    "rowwise_adagrad": RowwiseAdagrad,
    "rowwise_adam": RowwiseAdam,
    "lazy_adam": LazyAdam,
}
CUTS = "vocab", "embed", "block", "cyclic"
# fp32, and both ways to keep fp32 values of 16-bit weights.
CASES = [("rowwise_adagrad", "bfloat16"), ("rowwise_adam", "float32"), ("lazy_adam", "float16")]
CASES += [("rowwise_adam", "bfloat16")]


class Model(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed


def whole(dtype):
    torch.manual_seed(0)
    return StandardEmbedding(V, E, 2, sparse=True, dtype=getattr(torch, dtype))


def cut(embed, gang, how):
    if how in ("block", "cyclic"):
        return RowWiseEmbedding.from_embedding(embed, gang, placement=how)
    return {"vocab": VocabShardedEmbedding, "embed": ShardedEmbedding}[how].from_embedding(
        embed, gang
    )


def build(gang, how, kind, dtype):
    embed = whole(dtype)
    model = Model(embed if gang is None else cut(embed, gang, how))
    return model, KINDS[kind]([model.embed.weight], lr=LR, weight_decay=0.2)


def train(model, optimizer, steps, seed=0):
    """All ranks have the same ids, or where each has its own, the first has them. Some rows of the
    last rank's shard are never used."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randperm(V - 5, generator=generator)[:6]
        grad = torch.randn(6, E, generator=generator)
        if isinstance(model.embed, RowWiseEmbedding) and model.embed.gang.rank:
            ids, grad = ids[:0], grad[:0]
        optimizer.zero_grad()
        model.embed(ids).backward(grad.to(model.embed.weight.dtype))
        optimizer.step()
    optimizer.zero_grad()


def of_one_process(kind, dtype):
    model, optimizer = build(None, "", kind, dtype)
    train(model, optimizer, 3)
    return model, optimizer


def states(model, optimizer):
    """The whole table and its states, from state dicts of any gang."""
    with hook_state_dict(model, "full", optimizer=optimizer):
        table, state = model.state_dict(), optimizer.state_dict()
    return table["embed.weight"], state["state"].get(0, {}), state["param_groups"]


def assert_same(found, expected, path=""):
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert found.shape == expected.shape, path
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}.{i}")
    else:
        assert found == expected, path


def close(found, expected):
    """A mean of squares over sharded columns may round otherwise."""
    table, state, groups = found
    torch.testing.assert_close(table, expected[0], rtol=1e-2, atol=1e-2)
    for key, value in expected[1].items():
        if isinstance(value, torch.Tensor) and key != "remainder":
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
        elif key != "remainder":
            assert state[key] == value
    assert groups == expected[2]


def load_tables(*args, **options):
    TableLoader(*args, **options).load()


def saved_table(model, optimizer):
    return [SavedTable(["embed.weight"], model.embed, optimizer)]


def save(gang, how, kind, dtype, path):
    model, optimizer = build(gang, how, kind, dtype)
    train(model, optimizer, 3)
    save_tables(path / "files", saved_table(model, optimizer), gang)
    with hook_state_dict(model, "dtensor", optimizer=optimizer):
        table, state = get_state_dict(model, optimizer)
        group = gang.as_process_group()
        dcp.save(
            {"model": table, "optimizer": state}, checkpoint_id=path / "dcp", process_group=group
        )
    found = states(model, optimizer)
    if gang.rank == 0:
        torch.save(found, path / "whole.pt")
    return found


def load(gang, hows, kind, dtype, path):
    expected = torch.load(path / "whole.pt")
    for how in hows:
        model, optimizer = build(gang, how, kind, dtype)
        load_tables(path / "files", saved_table(model, optimizer), gang)
        assert_same(states(model, optimizer), expected)

        model, optimizer = build(gang, how, kind, dtype)
        with hook_state_dict(model, "dtensor", optimizer=optimizer):
            table, state = get_state_dict(model, optimizer)
            both = {"model": table, "optimizer": state}
            group = gang.as_process_group()
            dcp.load(both, checkpoint_id=path / "dcp", process_group=group)
            set_state_dict(model, optimizer, model_state_dict=table, optim_state_dict=state)
        assert_same(states(model, optimizer), expected)

        model, optimizer = build(gang, how, kind, dtype)
        with hook_state_dict(model, optimizer=optimizer):
            model.load_state_dict({"embed.weight": expected[0]})
            state = {"state": {0: expected[1]}, "param_groups": expected[2]}
            optimizer.load_state_dict(copy.deepcopy(state))
        assert_same(states(model, optimizer), expected)
        train(model, optimizer, 2, seed=1)
        found = states(model, optimizer)
        one, of_one = build(None, "", kind, dtype)
        one.load_state_dict({"embed.weight": expected[0]})
        of_one.load_state_dict(
            copy.deepcopy({"state": {0: expected[1]}, "param_groups": expected[2]})
        )
        train(one, of_one, 2, seed=1)
        close(found, states(one, of_one))


@pytest.mark.parametrize(("kind", "dtype"), CASES)
@pytest.mark.parametrize("how", CUTS)
def test_resharding(pool, tmp_path, how, kind, dtype):
    """From 2 ranks to 3, 1, 2 and 4, to each cut and placement, bit for bit."""
    found = pool(2, save, how, kind, dtype, tmp_path)[0]
    close(found, states(*of_one_process(kind, dtype)))
    pool(3, load, CUTS, kind, dtype, tmp_path)
    pool(2, load, [each for each in CUTS if each != how], kind, dtype, tmp_path)
    pool(1, load, ["vocab", "cyclic"], kind, dtype, tmp_path)
    pool(4, load, ["embed", "cyclic"], kind, dtype, tmp_path)
    model, optimizer = build(None, "", kind, dtype)  # By torch alone.
    optimizer.init_state()
    table, state = get_state_dict(model, optimizer)
    both = {"model": table, "optimizer": state}
    dcp.load(both, checkpoint_id=tmp_path / "files", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=table, optim_state_dict=state)
    assert_same(states(model, optimizer), torch.load(tmp_path / "whole.pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_plain_torch(kind, tmp_path):
    model, _ = build(None, "", kind, "bfloat16")
    optimizer = KINDS[kind](model.named_parameters(), lr=LR, weight_decay=0.2)
    train(model, optimizer, 2)
    both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(both, tmp_path / "one.pt")
    convert(tmp_path / "one.pt", tmp_path / "two", Request(to="dcp"), verify=True)
    other, _ = build(None, "", kind, "bfloat16")
    of_other = KINDS[kind](other.named_parameters(), lr=LR, weight_decay=0.2)
    of_other.init_state()
    table, state = get_state_dict(other, of_other)
    saved = {"model": table, "optimizer": state}
    dcp.load(saved, checkpoint_id=tmp_path / "two", no_dist=True)
    set_state_dict(other, of_other, model_state_dict=table, optim_state_dict=state)
    assert torch.equal(other.embed.weight, model.embed.weight)
    for key, value in optimizer.state[model.embed.weight].items():
        found = of_other.state[other.embed.weight][key]
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), key


def exchange(gang, kind, dtype):
    """DTensors of one cut, loaded into a model of the other."""
    for old in CUTS:
        model, optimizer = build(gang, old, kind, dtype)
        train(model, optimizer, 2)
        with hook_state_dict(model, "dtensor", optimizer=optimizer):
            table, state = model.state_dict(), optimizer.state_dict()
        for new in CUTS:
            other, of_other = build(gang, new, kind, dtype)
            with hook_state_dict(other, optimizer=of_other):
                other.load_state_dict(table)
                of_other.load_state_dict(state)
            assert_same(states(other, of_other), states(model, optimizer))
        with hook_state_dict(model, "sharded", optimizer=optimizer):
            table, state = model.state_dict(), copy.deepcopy(optimizer.state_dict())
        other, of_other = build(gang, old, kind, dtype)
        with hook_state_dict(other, "sharded", optimizer=of_other):
            other.load_state_dict(table)
            of_other.load_state_dict(state)
        assert_same(states(other, of_other), states(model, optimizer))
        if gang.size > 1:
            state["tp_embed_shard"][0]["rank"] = (gang.rank + 1) % gang.size
            with (
                pytest.raises(ValueError, match="must be whole or this rank's shard"),
                hook_state_dict(other, "sharded", optimizer=of_other),
            ):
                of_other.load_state_dict(state)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_dtensors_of_another_cut(pool, size, kind, dtype):
    pool(size, exchange, kind, dtype)


def load_otherwise(gang, path):
    """In another dtype, with another optimizer, without states, and what is refused."""
    expected = torch.load(path / "whole.pt")
    model, optimizer = build(gang, "cyclic", "rowwise_adam", "float32")
    load_tables(path / "files", saved_table(model, optimizer), gang)
    table, state, _ = states(model, optimizer)
    assert torch.equal(table.bfloat16(), expected[0])
    assert torch.equal(state["exp_avg"], expected[1]["exp_avg"])
    assert "remainder" not in state
    halves = {}
    for dtype in ("bfloat16", "float16"):
        half, of_half = build(gang, "vocab", "rowwise_adam", dtype)
        load_tables(path / "files", saved_table(half, of_half), gang)
        halves[dtype] = of_half.master(half.embed.weight)
    assert torch.equal(*halves.values())
    model, optimizer = build(gang, "vocab", "lazy_adam", "bfloat16")
    refused = []
    for rows, tables in ((V, None), (V + 1, None), (V, ["other"])):
        other = VocabShardedEmbedding(gang, rows, E)
        its = LazyAdam([other.weight])
        try:
            load_tables(path / "files", [SavedTable(tables or ["embed.weight"], other, its)], gang)
        except CheckpointError as e:
            refused.append(str(e))
    load_tables(path / "files", saved_table(model, optimizer), gang, with_states=False)
    gang.barrier()
    if gang.rank == 0:  # As after a save that was killed.
        (path / "files" / ".metadata").rename(path / "files" / "metadata")
    gang.barrier()
    for folder in ("files", "none"):
        try:
            load_tables(path / folder, saved_table(model, optimizer), gang)
        except CheckpointError as e:
            refused.append(str(e))
    assert torch.equal(states(model, optimizer)[0], expected[0])
    return refused


def test_loads_other_dtypes_and_refuses_other_tables(pool, tmp_path):
    pool(2, save, "block", "rowwise_adam", "bfloat16", tmp_path)
    for refused in pool(3, load_otherwise, tmp_path):
        kind, shape, names, killed, missing = refused
        assert "must be a `LazyAdam`, but" in kind
        assert "must have the shape (14, 6), but in" in shape
        assert "own, ['other'], but has ['embed.weight']" in names
        assert "must hold `.metadata`, but does not. Saving was not finished" in killed
        assert "There must be a directory" in missing


def shared(gang, path):
    """A table of two names, and a table of a gang that has no rows of it."""
    model, optimizer = build(gang, "vocab", "rowwise_adagrad", "float32")
    train(model, optimizer, 2)
    small = VocabShardedEmbedding(gang, 2, E, sparse=True)
    its = LazyAdam([small.weight])
    tables = [SavedTable(["two.weight", "one.weight"], model.embed, optimizer)]
    tables += [SavedTable(["small.weight"], small, its)]
    save_tables(path, tables, gang)
    saved = read(path, ReadOptions())
    assert len(saved.ties) == 1
    assert {*saved.names, *saved.ties} == {"one.weight", "two.weight", "small.weight"}
    expected = local(small.weight).clone()
    with torch.no_grad():
        local(small.weight).zero_()
    load_tables(path, tables, gang)
    assert torch.equal(local(small.weight), expected)


def test_shared_tables_and_empty_shards(pool, tmp_path):
    for size in (1, 3):
        pool(size, shared, tmp_path / str(size))


def fresh(gang, path):
    model, optimizer = build(gang, "vocab", "rowwise_adam", "bfloat16")
    save_tables(path, saved_table(model, optimizer), gang)
    other, of_other = build(gang, "vocab", "rowwise_adam", "bfloat16")
    train(other, of_other, 1)
    load_tables(path, saved_table(other, of_other), gang)
    assert_same(states(other, of_other), states(model, optimizer))


def test_before_the_first_step(pool, tmp_path):
    pool(2, fresh, tmp_path / "files")


def on_a_full_disk(gang, how, path):
    """The last rank can write 4 KB only."""
    model, optimizer = build(gang, how, "rowwise_adam", "float32")
    train(model, optimizer, 1)
    save_tables(path, saved_table(model, optimizer), gang)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if gang.rank == gang.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        save_tables(path, saved_table(model, optimizer), gang)
    except (OSError, GangError) as e:
        return f"{type(e).__name__}: {e}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


@pytest.mark.parametrize("how", ["block", "cyclic"])
def test_a_full_disk(pool, tmp_path, how):
    """All ranks raise, and what is there is no checkpoint."""
    *others, last = pool(3, on_a_full_disk, how, tmp_path)
    assert "File too large" in last
    for error in others:
        assert "GangError: Saving tables failed on rank 2" in error
    with pytest.raises(CheckpointError, match=r"must hold `\.metadata`"):
        read(tmp_path, ReadOptions(), "dcp")


def copies(gang, path):
    """Each of two copies of a table over one rank writes a part of the rows."""
    model, optimizer = build(None, "", "rowwise_adagrad", "float32")
    train(model, optimizer, 2)
    table = SavedTable(["embed.weight"], model.embed, optimizer, (gang.rank, gang.size))
    save_tables(path, [table], gang)
    sizes = [file.stat().st_size for file in sorted(path.glob("*.distcp"))]
    saved = read(path, ReadOptions())
    state = optimizer.state[model.embed.weight]
    for key, array in saved.tensors.items():
        if key.state in ("weight", "sum"):
            expected = model.embed.weight if key.state == "weight" else state["sum"]
            assert torch.equal(array.load(), expected)
    return sizes


def test_copies_write_a_part_each(pool, tmp_path):
    sizes = pool(2, copies, tmp_path / "files")[0]
    assert len(sizes) == 3


def test_files_know_all_row_states():
    declared = {name for kind in KINDS.values() for name in kind.row_states}
    assert declared == ROW_STATES
