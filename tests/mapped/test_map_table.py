"""Compares tables in memory-mapped files with the same tables in memory, and with plain torch."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from test_crashes import KINDS, TABLES, E, V, batch, found, make
from torch import nn

from tp_embed import FakeGang, StandardEmbedding, map_table
from tp_embed.checkpoint import hook_state_dict
from tp_embed.mapped.files import MappedFile
from tp_embed.mapped.resident import mapped_bytes
from tp_embed.optim import RowwiseAdagrad, RowwiseAdam
from tp_embed.parameter.sharded import local

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def train(embed, optimizer, table, rank, steps):
    for step in steps:
        ids, grad = batch(table, step, rank)
        embed(ids).backward(grad.to(embed.weight.dtype))
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one, other):
    (weight, state), (expected_weight, expected) = found(*one), found(*other)
    assert torch.equal(weight, expected_weight)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(state[name], value) if isinstance(value, torch.Tensor) else None
        assert same or state[name] == value, name


def as_in_memory(gang, directory):
    for table in TABLES:
        for i, kind in enumerate(KINDS):
            dtype = DTYPES[i]
            path = Path(directory) / table / kind
            embed, mapped, optimizer = make(gang, table, kind, dtype, path)
            plain, _, its = make(gang, table, kind, dtype, None)
            assert_same((embed, optimizer), (plain, its))
            for one in ((embed, optimizer), (plain, its)):
                train(*one, table, gang.rank, range(3))
            assert_same((embed, optimizer), (plain, its))
            assert mapped.step == 3
            mapped.close()
            embed, mapped, optimizer = make(gang, table, kind, dtype, path)
            assert_same((embed, optimizer), (plain, its))
            for one in ((embed, optimizer), (plain, its)):
                train(*one, table, gang.rank, range(3, 5))
                one[1].decay_all()
                one[1].refresh()
                train(*one, table, gang.rank, range(5, 6))
            assert torch.equal(embed.to_embedding().weight, plain.to_embedding().weight)
            assert_same((embed, optimizer), (plain, its))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_trains_as_in_memory(size, pool, tmp_path):
    pool(size, as_in_memory, str(tmp_path))


def whole(gang, directory):
    embed, _, optimizer = make(gang, "block", "rowwise_adagrad", torch.float32, Path(directory))
    start = embed.to_embedding().weight.detach().clone()
    train(embed, optimizer, "block", gang.rank, range(4))
    return start, embed.to_embedding().weight.detach()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_trains_as_one_process_of_plain_torch(size, pool, tmp_path):
    start, trained = pool(size, whole, str(tmp_path))[0]
    plain = nn.Embedding(V, E, padding_idx=5, _weight=start.clone(), sparse=True)
    optimizer = RowwiseAdagrad(plain.parameters(), lr=0.1, weight_decay=0.2)
    for step in range(4):
        ids, grads = zip(*(batch("block", step, rank) for rank in range(size)), strict=True)
        plain(torch.cat(ids)).backward(torch.cat(grads))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(trained, plain.weight.detach(), rtol=1e-6, atol=1e-6)


def restores(gang, directory):
    seen = []
    for table in TABLES:
        path = Path(directory) / table
        embed, mapped, optimizer = make(gang, table, "rowwise_adam", torch.bfloat16, path / "a")
        train(embed, optimizer, table, gang.rank, range(2))
        mapped.snapshot(path / "saved")
        train(embed, optimizer, table, gang.rank, range(2, 5))
        expected = found(embed, optimizer)
        mapped.restore(path / "saved")
        assert mapped.step == 2
        other = make(gang, table, "rowwise_adam", torch.bfloat16, path / "b")
        other[1].restore(path / "saved")
        for one, _, its in ((embed, mapped, optimizer), other):
            train(one, its, table, gang.rank, range(2, 5))
            weight, state = found(one, its)
            assert torch.equal(weight, expected[0])
            assert torch.equal(state["exp_avg"], expected[1]["exp_avg"])
            assert state["step"] == expected[1]["step"] == 5
        seen.append(mapped.step)
    return seen


@pytest.mark.parametrize("size", [1, 2, 3])
def test_restores_a_snapshot(size, pool, tmp_path):
    assert pool(size, restores, str(tmp_path))[0] == [5, 5, 5]


def keeps_values(gang, directory):
    for table in TABLES:
        plain, _, _ = make(gang, table, "lazy_adam", torch.float32, None)
        expected = plain.to_embedding().weight.detach()
        with map_table(plain, Path(directory) / table) as mapped:
            assert torch.equal(plain.to_embedding().weight, expected)
            assert plain.pad_idx == 5
            assert "step=0" in repr(mapped)
            with hook_state_dict(plain):
                saved = {name: value.clone() for name, value in plain.state_dict().items()}
            assert torch.equal(saved["weight"], expected)
            saved["weight"] += 1
            with hook_state_dict(plain):
                plain.load_state_dict(saved)
            assert torch.equal(plain.to_embedding().weight, expected + 1)
            plain.cpu().float().requires_grad_(False)
        again, mapped, _ = make(gang, table, "lazy_adam", torch.float32, Path(directory) / table)
        assert torch.equal(again.to_embedding().weight, expected + 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_keeps_the_values_of_a_table_in_memory(size, pool, tmp_path):
    pool(size, keeps_values, str(tmp_path))


def prefetched(gang, directory):
    for table in TABLES:
        path = Path(directory) / table
        embed, mapped, optimizer = make(gang, table, "lazy_adam", torch.float32, path)
        plain, _, its = make(gang, table, "lazy_adam", torch.float32, None)
        for step in range(4):
            mapped.prefetch(batch(table, step, gang.rank)[0])
            train(embed, optimizer, table, gang.rank, range(step, step + 1))
            train(plain, its, table, gang.rank, range(step, step + 1))
        assert_same((embed, optimizer), (plain, its))
        with pytest.raises(TypeError, match="integer dtype"):
            mapped.prefetch(torch.zeros(2))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prefetching_changes_no_values(size, pool, tmp_path):
    pool(size, prefetched, str(tmp_path))


def test_a_step_that_raises_writes_nothing(tmp_path, monkeypatch):
    embed, mapped, optimizer = make(
        FakeGang("cpu"), "vocab", "lazy_adam", torch.float32, tmp_path / "files"
    )
    train(embed, optimizer, "vocab", 0, range(1))
    before = found(embed, optimizer)
    update, calls = optimizer._update, []

    def fail(*args):
        calls.append(update(*args))
        if len(calls) == 2:
            raise RuntimeError("stop")

    monkeypatch.setattr("tp_embed.optim.rows._CACHED", 3)
    optimizer._update = fail
    with pytest.raises(RuntimeError, match="stop"):
        train(embed, optimizer, "vocab", 0, range(1, 2))
    assert mapped.step == 1
    after = found(embed, optimizer)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1]["exp_avg"], before[1]["exp_avg"])
    assert after[1]["step"] == 1


def test_resident_memory_is_bounded(tmp_path):
    """Of 200 MiB of weights and 200 MiB of moments, at most 32 MiB stay, next to the journal."""
    table = StandardEmbedding(200 << 10, 256, sparse=True, device="meta")
    before, most = mapped_bytes(), 0
    with map_table(table, tmp_path, resident=32 << 20):
        optimizer = RowwiseAdam([table.weight], lr=0.1)
        for step in range(40):
            ids = torch.randint(200 << 10, (2000,), generator=torch.Generator().manual_seed(step))
            table(ids).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            most = max(most, mapped_bytes() - before)
        total = table.weight.nbytes + optimizer.state[table.weight]["exp_avg"].nbytes
        assert total == 400 << 20
        for _ in range(3):  # A walk over all of it.
            assert torch.isfinite(table.weight.detach().sum())
        time.sleep(0.2)
        most_after_a_walk = mapped_bytes() - before
    assert most < 64 << 20
    assert most_after_a_walk < 64 << 20


def test_local_rows_are_in_the_files(tmp_path):
    embed, mapped, optimizer = make(
        FakeGang("cpu"), "vocab", "rowwise_adagrad", torch.float32, tmp_path
    )
    train(embed, optimizer, "vocab", 0, range(2))
    on_disk = torch.from_file(str(mapped.path / "weight.bin"), size=V * E).view(V, E)
    assert torch.equal(on_disk, local(embed.weight))


def test_maps_the_pages_of_rows_beyond_2_gib(tmp_path):
    """Whose rows come as int32, as ranks send them; of rows of 640 bytes, some cross pages."""
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 5 << 29)  # Takes no space.
    file = MappedFile(path, 5 << 29)
    rows = torch.tensor([0, 6, 7, 4_000_000], dtype=torch.int32)
    pages = file.absent(rows, 640)
    assert pages.tolist() == [0, 1, 625_000]
    file.fetch(pages)
    assert file.present == 0
    file.populate(pages)
    assert file.present == 3
    assert len(file.absent(rows, 640)) == 0
    assert not file.bytes[:8192].any()
    assert file.absent(torch.tensor([1]), 16384).tolist() == [4, 5, 6, 7]
    file.release()
    assert file.absent(rows, 640).tolist() == pages.tolist()
