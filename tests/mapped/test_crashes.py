"""Kills ranks that train a table in memory-mapped files, at any moment, and trains on."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tp_embed.optim.rows
from forks import fork_context
from tp_embed import ProcessGroupGang, RowWiseEmbedding, VocabShardedEmbedding, map_table
from tp_embed.optim import LazyAdam, RowwiseAdagrad, RowwiseAdam
from tp_embed.parameter.sharded import local

V, E, N, STEPS = 41, 6, 12, 60
KINDS = {"rowwise_adagrad": RowwiseAdagrad, "rowwise_adam": RowwiseAdam, "lazy_adam": LazyAdam}
TABLES = {
    "block": RowWiseEmbedding,
    "cyclic": partial(RowWiseEmbedding, placement="cyclic"),
    "vocab": VocabShardedEmbedding,
}
CASES = [
    (1, "block", "rowwise_adagrad", torch.float32),
    (1, "vocab", "rowwise_adam", torch.bfloat16),
    (2, "cyclic", "lazy_adam", torch.float32),
    (2, "vocab", "rowwise_adagrad", torch.float16),
    (2, "block", "rowwise_adam", torch.bfloat16),
]


class Killer(TorchDispatchMode):
    """Ends this process before an operator of torch, or a write to a file."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left, self.pwrite = after, os.pwrite

    def count(self):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        os.pwrite = self.write
        return super().__enter__()

    def __exit__(self, *args):
        os.pwrite = self.pwrite
        super().__exit__(*args)

    def write(self, *args):
        self.count()
        return self.pwrite(*args)


def batch(table: str, step: int, rank: int):
    generator = torch.Generator().manual_seed(100 * step + (0 if table == "vocab" else rank))
    ids = torch.randint(V, (N,), generator=generator)
    return ids, torch.randn(N, E, generator=generator)


def make(gang, table: str, kind: str, dtype, directory: Path | None):
    torch.manual_seed(3)
    device = "cpu" if directory is None else "meta"
    embed = TABLES[table](gang, V, E, 5, sparse=True, dtype=dtype, device=device)
    mapped = None if directory is None else map_table(embed, directory)
    return embed, mapped, KINDS[kind]([embed.weight], lr=0.1, weight_decay=0.2)


def found(embed, optimizer):
    state = optimizer.state_dict()["state"].get(0, {})
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    state.pop("optimizer", None)
    return local(embed.weight).clone(), state


def train(embed, optimizer, table, rank, steps, killer=None):
    for step in steps:
        ids, grad = batch(table, step, rank)
        embed(ids).backward(grad.to(embed.weight.dtype))
        if killer:
            with killer:
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def start_gang(rank: int, size: int, store: str):
    torch.set_num_threads(1)
    tp_embed.optim.rows._CACHED = 3  # Several blocks a step.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    return ProcessGroupGang(None, "cpu")


def undisturbed(rank, size, store, out, table, kind, dtype):
    """Trains in memory, and saves the table and its states after each step."""
    gang = start_gang(rank, size, store)
    embed, _, optimizer = make(gang, table, kind, dtype, None)
    history = [found(embed, optimizer)]
    history += [found(embed, optimizer) for _ in train(embed, optimizer, table, rank, range(STEPS))]
    torch.save(history, f"{out}/history{rank}.pt")
    dist.barrier()


def check(embed, optimizer, step, out, rank):
    weight, state = found(embed, optimizer)
    expected_weight, expected = torch.load(f"{out}/history{rank}.pt")[step]
    assert torch.equal(weight, expected_weight)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name], value), name
        else:
            assert state[name] == value, name


def until_killed(rank, size, store, out, table, kind, dtype, after, last):
    gang = start_gang(rank, size, store)
    embed, mapped, optimizer = make(gang, table, kind, dtype, Path(out) / "files")
    assert mapped.step >= last
    check(embed, optimizer, mapped.step, out, rank)
    killer = None if after is None else Killer(after)
    for step in train(embed, optimizer, table, rank, range(mapped.step, STEPS), killer):
        Path(f"{out}/done{rank}").write_text(str(step))
    check(embed, optimizer, STEPS, out, rank)
    dist.barrier()


def ranks(target, size, out, *args, of_rank=None):
    """Starts ranks, with ``args`` and their own arguments."""
    store = f"{out}/store{time.monotonic_ns()}"
    processes = [
        fork_context().Process(
            target=target, args=(rank, size, store, out, *args, *(of_rank or {}).get(rank, ()))
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def done(out, rank):
    file = Path(f"{out}/done{rank}")
    return int(file.read_text() or 0) if file.exists() else 0


@pytest.mark.parametrize(("size", "table", "kind", "dtype"), CASES)
def test_a_killed_run_goes_on_after_its_last_step(size, table, kind, dtype, tmp_path):
    """Bit for bit, and no rank loses more than the step that ran."""
    out, case = str(tmp_path), (table, kind, dtype)
    finish(ranks(undisturbed, size, out, *case))
    generator = torch.Generator().manual_seed(size)
    for trial in range(8):
        after, pause = torch.randint(1000, (2,), generator=generator).tolist()
        # Ranks wait for each other in each lookup, so they are at most one step apart.
        last = max(done(out, rank) for rank in range(size)) - (size > 1)
        victim, is_hooked = trial % size, trial % 3 != 2
        plans = dict.fromkeys(range(size), (None, last))
        if is_hooked:
            plans[victim] = (after, last)
        processes = ranks(until_killed, size, out, *case, of_rank=plans)
        if not is_hooked:
            time.sleep(0.1 + pause / 1000)
            processes[victim].kill()
        wait([process.sentinel for process in processes], 60)
        for process in processes:
            process.join(0.3 if trial % 2 else 0.0)
            process.kill()
            process.join()
            assert process.exitcode in (0, 1, -signal.SIGKILL)
            assert process.exitcode != 1 or not is_hooked or size > 1  # The other rank has gone.
    finish(ranks(until_killed, size, out, *case, of_rank={0: (None, 0), 1: (None, 0)}))


def make_until_killed(rank, size, store, out, after):
    gang = start_gang(rank, size, store)
    with Killer(after if rank == 0 else 10**9):
        make(gang, "block", "lazy_adam", torch.float32, Path(out) / "files")
    dist.barrier()


def opens(rank, size, store, out):
    gang = start_gang(rank, size, store)
    embed, mapped, _ = make(gang, "block", "lazy_adam", torch.float32, Path(out) / "files")
    expected, _, _ = make(gang, "block", "lazy_adam", torch.float32, None)
    assert mapped.step == 0
    assert torch.equal(local(embed.weight), local(expected.weight))
    dist.barrier()


@pytest.mark.parametrize("size", [1, 2])
def test_a_table_whose_making_was_killed_is_made_again(size, tmp_path):
    for after in (0, 10, 20, 60):
        processes = ranks(make_until_killed, size, str(tmp_path), after)
        wait([process.sentinel for process in processes], 60)
        for process in processes:
            process.kill()
            process.join()
    finish(ranks(opens, size, str(tmp_path)))


def restores_until_killed(rank, size, store, out):
    gang = start_gang(rank, size, store)
    embed, mapped, optimizer = make(gang, "block", "lazy_adam", torch.float32, Path(out) / "files")
    list(train(embed, optimizer, "block", rank, range(1)))
    mapped.snapshot(f"{out}/saved")
    with Killer(3):
        mapped.restore(f"{out}/saved")


def refuses(rank, size, store, out):
    gang = start_gang(rank, size, store)
    with pytest.raises(ValueError, match="must hold a whole table"):
        make(gang, "block", "lazy_adam", torch.float32, Path(out) / "files")


def test_files_of_a_restore_that_was_killed_are_refused(tmp_path):
    (process,) = ranks(restores_until_killed, 1, str(tmp_path))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    finish(ranks(refuses, 1, str(tmp_path)))
