"""States of optimizers that go to memory-mapped files, stay there, and come from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_crashes import KINDS, TABLES, E, V, found, make
from test_map_table import DTYPES, assert_same, train
from torch import nn

from tp_embed import GangError, StandardEmbedding, map_table
from tp_embed.checkpoint import hook_state_dict
from tp_embed.optim import LazyAdam, RowwiseAdagrad
from tp_embed.parameter.sharded import local


def goes_on_in_files(gang, directory):
    for table in TABLES:
        for kind, dtype in zip(KINDS, DTYPES, strict=True):
            path = Path(directory) / table / kind
            one, plain = (make(gang, table, kind, dtype, None) for _ in range(2))
            for embed, _, optimizer in (one, plain):
                train(embed, optimizer, table, gang.rank, range(3))
            embed, _, optimizer = one
            with map_table(embed, path) as mapped:
                mapped.snapshot(path / "saved")
                for each, its in ((embed, optimizer), (plain[0], plain[2])):
                    train(each, its, table, gang.rank, range(3, 6))
                assert_same((embed, optimizer), (plain[0], plain[2]))
                mapped.restore(path / "saved")
                train(embed, optimizer, table, gang.rank, range(3, 6))
                assert_same((embed, optimizer), (plain[0], plain[2]))
            again, _, its = make(gang, table, kind, dtype, path)
            assert_same((again, its), (plain[0], plain[2]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_table_trained_in_memory_goes_on_in_files(size, pool, tmp_path):
    """Bit for bit, with the states of its optimizer, also from a snapshot before the next step."""
    pool(size, goes_on_in_files, str(tmp_path))


def saves_whole(gang, directory):
    embed, _, optimizer = make(gang, "cyclic", "rowwise_adam", torch.bfloat16, Path(directory))
    train(embed, optimizer, "cyclic", 0, range(3))
    with hook_state_dict(embed, optimizer=optimizer):
        saved = embed.state_dict(), optimizer.state_dict()
    assert "optimizer" not in saved[1]["state"][0]
    if gang.rank == 0:
        torch.save(saved, f"{directory}/whole.pt")


def loads_whole(gang, directory):
    made = [make(gang, "vocab", "rowwise_adam", torch.bfloat16, None) for _ in range(2)]
    for embed, _, optimizer in made:
        table, states = torch.load(f"{directory}/whole.pt")
        with hook_state_dict(embed, optimizer=optimizer):
            embed.load_state_dict(table)
            optimizer.load_state_dict(states)
    (embed, _, optimizer), (plain, _, its) = made
    with map_table(embed, Path(directory) / f"over{gang.size}"):
        for one in ((embed, optimizer), (plain, its)):
            train(*one, "vocab", gang.rank, range(3, 5))
        assert_same((embed, optimizer), (plain, its))
        assert found(embed, optimizer)[1]["step"] == 5


@pytest.mark.parametrize("size", [1, 3])
def test_files_of_two_ranks_go_to_other_numbers_of_ranks(size, pool, tmp_path):
    pool(2, saves_whole, str(tmp_path))
    pool(size, loads_whole, str(tmp_path))


def table_of(dtype=torch.float32):
    torch.manual_seed(0)
    return StandardEmbedding(V, E, sparse=True, dtype=dtype)


def step(table, optimizer):
    table(torch.arange(4)).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_states_that_cannot_move(tmp_path):
    table = table_of()
    with map_table(table, tmp_path / "a"):
        step(table, RowwiseAdagrad([table.weight]))
    other, half = table_of(), table_of(torch.bfloat16)
    optimizers = [RowwiseAdagrad([t.weight]) for t in (other, half)]
    for one, its in zip((other, half), optimizers, strict=True):
        step(one, its)
    before = found(other, optimizers[0])
    with pytest.raises(ValueError, match=r"must be a new one.* has states of 1 steps"):
        map_table(other, tmp_path / "a")
    with pytest.raises(ValueError, match=r"`dtype` must be torch.bfloat16"):
        map_table(half, tmp_path / "half", dtype=torch.float32)
    after = found(other, optimizers[0])
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1]["sum"], before[1]["sum"])
    step(other, optimizers[0])
    with map_table(other, tmp_path / "b"):
        step(other, optimizers[0])
        optimizers[0].state[other.weight] = {"step": 1, "sum": torch.zeros(V)}
        with pytest.raises(ValueError, match=r"must be in `.*`, but are in memory"):
            step(other, optimizers[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_init_state_keeps_the_states_in_files(dtype, tmp_path):
    runs = []
    for name in ("plain", "dtensor"):
        for _ in range(2):
            table = table_of(dtype)
            with map_table(table, tmp_path / name) as mapped:
                optimizer = LazyAdam([table.weight], weight_decay=0.1)
                if name == "dtensor":
                    with hook_state_dict(nn.Sequential(table), "dtensor", optimizer=optimizer):
                        assert optimizer.state_dict()["state"][0]["step"] == mapped.step
                step(table, optimizer)
                weight, state = found(table, optimizer)
                runs.append((weight.clone(), state))
        with map_table(table_of(dtype), tmp_path / name) as mapped:
            assert torch.equal(mapped._store.state()["exp_avg"], state["exp_avg"])
            with pytest.raises(ValueError, match=r"`exp_avg` of .* must be new"):
                mapped._store.zeros("exp_avg", (V, E), torch.float32)
    for (weight, state), (expected, its) in zip(runs[2:], runs[:2], strict=True):
        assert torch.equal(weight, expected)
        assert torch.equal(state["exp_avg_sq"], its["exp_avg_sq"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_mapped", [False, True])
def test_refresh_takes_written_weights_without_missed_decay(dtype, is_mapped, tmp_path):
    """Also by an optimizer that has just been made, over files that go on."""
    table = table_of(dtype)
    mapped = map_table(table, tmp_path) if is_mapped else None
    optimizer = RowwiseAdagrad([table.weight], lr=0.5, weight_decay=0.5)
    for _ in range(3):
        step(table, optimizer)
    if mapped is not None:
        mapped.close()
        table = table_of(dtype)
        mapped = map_table(table, tmp_path)
        optimizer = RowwiseAdagrad([table.weight], lr=0.5, weight_decay=0.5)
    table.weight.data.fill_(3.0)
    optimizer.refresh()
    optimizer.decay_all()
    assert torch.equal(table.weight, torch.full_like(table.weight, 3.0))
    optimizer.param_groups[0]["weight_decay"] = 0.0
    step(table, optimizer)
    assert torch.equal(table.weight[4:], torch.full_like(table.weight[4:], 3.0))
    assert (table.weight[:4] > 2.0).all()
    if mapped is not None:
        mapped.close()


def fails_on_one_rank(gang, directory):
    for device in ("cpu", "meta"):
        embed, _, _ = make(gang, "block", "lazy_adam", torch.float32, None)
        expected = embed.to_embedding().weight.detach()
        if device == "meta":
            embed.to_empty(device="meta")
        path = Path(directory) / device
        with pytest.raises(ValueError if gang.rank == gang.size - 1 else GangError):
            map_table(embed, path, resident=0 if gang.rank == gang.size - 1 else 1 << 20)
        blocked = path / f"rank-{gang.rank}-of-{gang.size}" / ".table.json.new"
        if gang.rank == gang.size - 1:  # So `table.json` can't be written.
            blocked.mkdir(parents=True)
        with pytest.raises(OSError if gang.rank == gang.size - 1 else GangError):
            map_table(embed, path)
        if gang.rank == gang.size - 1:
            blocked.rmdir()
        assert embed.weight.device.type == device
        with map_table(embed, path):
            if device == "cpu":
                assert torch.equal(embed.to_embedding().weight, expected)
            assert local(embed.weight).isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_map_that_failed_on_one_rank_can_be_repeated(size, pool, tmp_path):
    pool(size, fails_on_one_rank, str(tmp_path))
