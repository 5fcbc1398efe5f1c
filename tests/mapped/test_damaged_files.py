"""Files that are damaged, and what writes whole tables and fails."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from test_crashes import finish, found, make, ranks, start_gang
from test_map_table import train
from test_moved_states import step, table_of

from tp_embed import GangError, map_table
from tp_embed.mapped.store import RowStore
from tp_embed.optim import RowwiseAdagrad
from tp_embed.parameter.sharded import local

FILES = "weight.bin", "sum.bin", "row_decay.bin", "records", "journal"


def full(*args):
    raise OSError(28, "No space left on device")


def make_run(directory):
    table = table_of()
    mapped = map_table(table, directory)
    return table, mapped, RowwiseAdagrad([table.weight], lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("size", [None, 0, 16])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_missing_or_cut_are_refused(name, size, tmp_path):
    table, mapped, optimizer = make_run(tmp_path)
    step(table, optimizer)
    mapped.close()
    file = mapped.path / name
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)
    with pytest.raises(ValueError, match="Delete the directory, map the table again, and restore"):
        make_run(tmp_path)


def test_a_journal_that_is_cut_does_not_undo(tmp_path):
    table, mapped, optimizer = make_run(tmp_path)
    step(table, optimizer)
    mapped._store._journal._head[0] = 2  # As a process that is killed in its step.
    mapped._store.close()
    os.truncate(mapped.path / "journal", 4096)
    with pytest.raises(ValueError, match=r"journal` must have at least .* but has 4096"):
        make_run(tmp_path)


@pytest.mark.parametrize("name", ["weight.bin", "sum.bin"])
@pytest.mark.parametrize("size", [None, 16])
def test_a_snapshot_that_is_cut_is_refused_before_anything_is_written(name, size, tmp_path):
    table, mapped, optimizer = make_run(tmp_path / "run")
    step(table, optimizer)
    mapped.snapshot(tmp_path / "saved")
    mapped.snapshot(tmp_path / "good")
    step(table, optimizer)
    before = found(table, optimizer)
    file = tmp_path / "saved" / mapped.path.name / name
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)
    with pytest.raises(ValueError, match=f"{name}` must have at least .* Choose another snapshot"):
        mapped.restore(tmp_path / "saved")
    after = found(table, optimizer)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1]["sum"], before[1]["sum"])
    step(table, optimizer)
    mapped.restore(tmp_path / "good")
    assert mapped.step == 1
    mapped.close()


def test_a_decay_that_failed_refuses_the_table_until_a_restore(tmp_path, monkeypatch):
    table, mapped, optimizer = make_run(tmp_path / "run")
    step(table, optimizer)
    mapped.snapshot(tmp_path / "saved")
    expected = found(table, optimizer)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tp_embed.optim.rows._catch_up", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.decay_all()
    for use in (
        lambda: table(torch.arange(3)),
        lambda: step(table, optimizer),
        optimizer.state_dict,
        optimizer.decay_all,
        mapped.flush,
        lambda: mapped.snapshot(tmp_path / "other"),
        lambda: mapped.prefetch(torch.arange(3)),
    ):
        with pytest.raises(ValueError, match=r"a whole table.* `MappedTable.restore\(\)`"):
            use()
    mapped.restore(tmp_path / "saved")
    after = found(table, optimizer)
    assert torch.equal(after[0], expected[0])
    assert torch.equal(after[1]["sum"], expected[1]["sum"])
    step(table, optimizer)
    mapped.close()
    assert make_run(tmp_path / "run")[1].step == 2


def test_a_snapshot_that_failed_leaves_nothing(tmp_path, monkeypatch):
    table, mapped, _ = make_run(tmp_path / "run")
    mapped.snapshot(tmp_path / "saved")
    monkeypatch.setattr("tp_embed.mapped.directory.write_file", full)
    with pytest.raises(OSError, match="No space left"):
        mapped.snapshot(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == [mapped.path.name]
    mapped.restore(tmp_path / "saved")
    assert torch.equal(table.weight, table_of().weight)
    mapped.close()


def restores(rank, size, store, out, victim, moment):
    gang = start_gang(rank, size, store)
    embed, mapped, optimizer = make(gang, "block", "lazy_adam", torch.float32, Path(out) / "files")
    mapped.snapshot(f"{out}/start")
    train(embed, optimizer, "block", rank, range(2))
    mapped.snapshot(f"{out}/saved")
    mapped.restore(f"{out}/start")
    train(embed, optimizer, "block", rank, range(2, 4))  # Another history, of the same step.
    if rank == victim:

        def kill(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(RowStore, moment, kill)
    mapped.restore(f"{out}/saved")


def refused(rank, size, store, out):
    gang = start_gang(rank, size, store)
    with pytest.raises((ValueError, GangError), match="must hold a whole table"):
        make(gang, "block", "lazy_adam", torch.float32, Path(out) / "files")


@pytest.mark.parametrize("moment", ["take", "end_rewriting"])
def test_a_restore_that_was_killed_before_one_rank_began_is_refused(moment, tmp_path):
    """Else the ranks would hold rows of two histories, at the same step."""
    processes = ranks(restores, 2, str(tmp_path), 1, moment)
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    assert processes[1].exitcode == -signal.SIGKILL
    finish(ranks(refused, 2, str(tmp_path)))


def fails_on_one_rank(gang, directory):
    path, last = Path(directory), gang.rank == gang.size - 1
    embed, mapped, optimizer = make(gang, "block", "lazy_adam", torch.float32, path / "files")
    train(embed, optimizer, "block", gang.rank, range(2))
    mapped.snapshot(path / "saved")
    expected = local(embed.weight).clone()
    take = RowStore.take
    try:
        RowStore.take = full if last else take
        with pytest.raises(OSError if last else GangError, match="No space left"):
            mapped.restore(path / "saved")
    finally:
        RowStore.take = take
    with pytest.raises(ValueError, match="must hold a whole table"):
        train(embed, optimizer, "block", gang.rank, range(2, 3))
    mapped.restore(path / "saved")
    assert torch.equal(local(embed.weight), expected)
    train(embed, optimizer, "block", gang.rank, range(2, 3))
    assert mapped.step == 3
    mapped.close()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_restore_that_failed_on_one_rank_can_be_repeated(size, pool, tmp_path):
    pool(size, fails_on_one_rank, str(tmp_path))
