"""Counts collectives, and monitors a training loop of plain torch."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import profile
from torch.utils.tensorboard import SummaryWriter

from tp_embed import FakeGang, shard_embeddings
from tp_embed.gang import Gang
from tp_embed.monitor.run_log import read_run
from tp_embed.monitor.tables import Monitor, count_unique, watched_tables
from tp_embed.monitor.traffic import Traffic
from tp_embed.partition import Partition

V, E, STEPS, EVERY = 19, 6, 6, 2


class Model(nn.Module):
    """Returns the loss and the logits. The head shares the table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, E)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        logits = self.head(self.embed(ids).tanh())
        return cross_entropy(logits[:-1], ids[1:]), logits

    def get_output_embeddings(self):
        return self.head


def build():
    torch.manual_seed(0)
    return Model()


def batches():
    return torch.randint(V, (STEPS, 16), generator=torch.Generator().manual_seed(1))


def train(model, monitor=None):
    """Returns the norm of the table's gradient, and the loss, of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = monitor and monitor(model, optimizer)
    seen = []
    for step, ids in enumerate(batches()):
        optimizer.zero_grad()
        loss, _ = model(ids)
        loss.backward()
        if monitor:
            monitor.record(lr=0.1 * step)
        optimizer.step()
        with torch.no_grad():
            model.eval()
            model(ids[:3])
            model.train()
        seen.append((model.embed.weight.grad.norm().item(), loss.item()))
    return seen, monitor


def watched(gang: Gang, directory, strategy: str):
    model = build()
    shard_embeddings(model, gang, strategy=strategy)
    writer = SummaryWriter(directory) if gang.rank == 0 else None
    _, monitor = train(
        model, lambda *args: Monitor(*args, writer, every=EVERY, directory=directory)
    )
    if writer:
        writer.close()
    monitor.close()
    return monitor.rows


def looked_up_bytes(strategy, ids, size):
    """Returns the bytes of a lookup by all-to-alls and by all-gathers, averaged over ranks."""
    item, distinct = torch.float32.itemsize, sorted(set(ids))
    if strategy == "embed":
        count = len(distinct) if len(distinct) <= 0.85 * len(ids) else len(ids)
        return 0, (size - 1) * count * -(-E // size) * item
    owners = [Partition(V, size).shard(rank) for rank in range(size)]
    counts = [sum(i in owner for i in distinct) for owner in owners]
    gathered = (size - 1) * len(distinct) * E * item / size
    if max(counts) * (size - 1) <= len(distinct):
        return 0, gathered
    parts = [Partition(len(distinct), size).shard(rank) for rank in range(size)]
    moved = sum(
        i not in owner
        for owner, part in zip(owners, parts, strict=True)
        for i in distinct[part.start : part.stop]
    )
    return moved * E * item / size, gathered


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_tensorboard_shows_what_one_process_computes(pool, tmp_path, strategy):
    rows = pool(4, watched, str(tmp_path), strategy)
    assert rows[1:] == [[], [], []]
    events = EventAccumulator(str(tmp_path)).Reload()

    def scalars(tag):
        found = {e.step: e.value for e in events.Scalars(f"Train/Steps/{tag}")}
        assert list(found) == list(range(EVERY, STEPS + 1, EVERY))
        return list(found.values())

    alone, _ = train(build())
    sampled = range(EVERY - 1, STEPS, EVERY)
    norms, losses = zip(*(alone[step] for step in sampled), strict=True)
    assert scalars("tp_embed/grad_norm/embed") == pytest.approx(norms, rel=1e-6)
    assert scalars("train_loss") == pytest.approx(losses, rel=1e-6)
    ratios = [len(torch.unique(batches()[step])) / 16 for step in sampled]
    assert scalars("tp_embed/unique_ratio/embed") == pytest.approx(ratios)
    assert scalars("lr") == pytest.approx([0.1 * step for step in sampled])

    # The volumes in the docstrings of the layers, without the evaluations in between.
    n, size = 16 * torch.float32.itemsize, 4
    blocks = {"embed": -(-E // size), "vocab": -(-V // size)}
    looked_up = [looked_up_bytes(strategy, batches()[step].tolist(), size) for step in sampled]
    if strategy == "embed":  # The lookup, and the gradient of the head's input; the logits.
        gathered, reduced = (size - 1) * n * blocks["embed"], 3 * n * V / 2
    else:  # The lookup, and the logits; the gradient of the head's input.
        gathered, reduced = (size - 1) * n * blocks["vocab"], 3 * n * E / 2
    by_step = [
        {"all_gather": gathered + spread[1], "all_reduce": reduced, "all_to_all": spread[0]}
        for spread in looked_up
    ]
    for operation in ("all_gather", "all_reduce"):
        found = scalars(f"tp_embed/exchange_bytes/{operation}")
        assert found == [step[operation] for step in by_step]
    assert scalars("tp_embed/exchange_bytes") == [sum(step.values()) for step in by_step]
    times = zip(scalars("tp_embed/exchange_ms"), scalars("tp_embed/step_ms"), strict=True)
    assert all(0 < exchange < step for exchange, step in times)
    speeds = zip(scalars("tp_embed/tokens_per_second"), scalars("tp_embed/step_ms"), strict=True)
    assert [speed * step / 1000 for speed, step in speeds] == pytest.approx([16] * 3, rel=1e-4)
    # A plausible size of this process.
    assert all(50 < mib < 4000 for mib in scalars("tp_embed/memory_mib"))


@pytest.mark.parametrize("sparse", [False, True])
def test_one_process_without_a_gang(sparse):
    model = nn.Sequential(nn.Embedding(V, E, sparse=sparse), nn.Flatten(0), nn.Linear(4 * E, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    loss = model(torch.tensor([1, 2, 2, 2])).sum()
    loss.backward()
    norm = model[0].weight.grad.to_dense().norm().item()
    monitor.record(loss=loss)
    optimizer.step()
    (row,) = monitor.rows
    assert row["grad_norm"] == {"0": pytest.approx(norm)}
    assert row["unique_ratio"] == {"0": 0.5}
    assert row["loss"] == pytest.approx(loss.item())
    assert row["traffic"] == {}
    monitor.close()
    model(torch.tensor([1, 2, 3, 4])).sum().backward()
    optimizer.step()
    assert len(monitor.rows) == 1


def test_tables_that_share_a_weight_count_once_and_frozen_ones_not_at_all():
    model = build()
    assert list(watched_tables(model)) == ["embed"]
    shard_embeddings(model, FakeGang("cpu"), strategy="vocab")
    assert list(watched_tables(model)) == ["embed"]
    model.embed.weight.requires_grad_(False)
    assert watched_tables(model) == {}


@given(st.lists(st.integers(-3, 3)), st.sampled_from([torch.int64, torch.int32, torch.int16]))
def test_unique_ids_are_those_of_torch(ids, dtype):
    tensor = torch.tensor(ids, dtype=dtype)
    assert count_unique(tensor).tolist() == [len(torch.unique(tensor)), len(ids)]


def test_callers_loss_goes_before_the_models_and_secrets_are_not_written(tmp_path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    about = {"comet": {"api_key": "abc123", "project": "mine"}, "seed": 1}
    monitor = Monitor(model, optimizer, every=1, directory=tmp_path, about=about)
    model(batches()[0])[0].backward()
    monitor.record(loss=torch.tensor([7.0]), temperature=torch.tensor(0.5))
    optimizer.step()
    (row,) = monitor.rows
    assert row["loss"] == 7.0
    assert row["values"] == {"temperature": 0.5}
    run = read_run(tmp_path)
    assert run.rows == [row]
    assert run.about["comet"] == {"api_key": "(left out)", "project": "mine"}
    assert run.about["seed"] == 1
    assert run.about["versions"]["torch"] == torch.__version__


def test_secrets_of_the_command_are_not_written(tmp_path, monkeypatch):
    command = ["train.py", "+comet.api_key=abc", "--hf-token", "abc", "--password=abc", "seed=1"]
    monkeypatch.setattr(sys, "argv", [*command, "pad_token=x", "--token", "abc", "--verbose"])
    about = {"loggers": [{"api_key": "abc", "name": "mine"}]}
    Monitor(build(), directory=tmp_path, about=about).close()
    found = read_run(tmp_path).about
    assert "abc" not in json.dumps(found)
    assert found["loggers"][0]["name"] == "mine"
    assert found["command"][-4:] == ["pad_token=x", "--token", "(left out)", "--verbose"]


class LikeTransformers(Model):
    def forward(self, ids, num_items_in_batch=None):
        loss, logits = super().forward(ids)
        return loss if num_items_in_batch is None else loss * 15 / num_items_in_batch, logits


def test_forwards_without_gradients_and_parts_of_a_loss_do_not_count():
    model = LikeTransformers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    ids = batches()[0]
    for items in (None, 60):
        with torch.no_grad():  # An evaluation in training mode, as for dropout.
            model(ids[:5])
        loss, _ = model(ids, num_items_in_batch=items)
        loss.backward()
        with torch.no_grad():
            model(ids[:5])
        optimizer.step()
        row = monitor.rows[-1]
        assert row["loss"] == (loss.item() if items is None else None)
        assert row["unique_ratio"] == {"embed": len(torch.unique(ids)) / 16}
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(16)


def test_only_the_last_rows_are_held(monkeypatch):
    monkeypatch.setattr("tp_embed.monitor.tables._MOST_ROWS", 3)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    for ids in batches()[:5]:
        model(ids)[0].backward()
        optimizer.step()
    assert [row["step"] for row in monitor.rows] == [3, 4, 5]


def test_a_monitor_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="`every` must be greater than or equal to 1, but is 0"):
        Monitor(build(), every=0)


def exchange(gang: Gang):
    first, second = Traffic(gang, gang), Traffic(gang)
    x = torch.ones(100)  # 400 bytes
    gang.all_gather(torch.empty(4, 100), x)
    gang.all_reduce(x)
    gang.all_reduce(x)
    second.close()
    gang.reduce_scatter(torch.empty(25), x.view(4, 25))
    gang.all_to_all(torch.empty(100), x)
    gang.broadcast(x)
    gang.barrier()
    if gang.rank == 0:
        time.sleep(1.5)
    gang.barrier()
    first.close()
    gang.barrier()
    return first.by_operation(), first.total(), second.by_operation()


def test_traffic_counts_calls_bytes_and_time_until_it_is_closed(pool):
    for rank, (found, total, second) in enumerate(pool(4, exchange)):
        sent = {name: (entry.calls, entry.bytes_sent) for name, entry in found.items()}
        # By hand, from the formulas for four ranks.
        assert sent == {
            "all_gather": (1, 1200),
            "all_reduce": (2, 1200),
            "all_to_all": (1, 300),
            "barrier": (2, 0),
            "broadcast": (1, 400),
            "reduce_scatter": (1, 300),
        }
        assert (total.calls, total.bytes_sent) == (8, 3400)
        assert total.seconds == pytest.approx(sum(entry.seconds for entry in found.values()))
        assert all(entry.seconds > 0 for entry in found.values())
        if rank:  # Waits for the late rank.
            assert found["barrier"].seconds > 0.1
        assert {name: entry.calls for name, entry in second.items()} == {
            "all_gather": 1,
            "all_reduce": 2,
        }


def profiled(gang: Gang):
    model = build()
    shard_embeddings(model, gang, strategy="vocab", check_ids=False)
    with profile() as profiler:
        model(batches()[0])[0].backward()
    return {event.key: event.count for event in profiler.key_averages()}


def test_profiler_shows_the_exchange_by_name(pool):
    for events in pool(2, profiled):
        assert events["tp_embed.all_gather"] == 2
        assert events["tp_embed.all_reduce"] == 1
