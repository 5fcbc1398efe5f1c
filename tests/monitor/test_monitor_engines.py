"""Compares monitored engines with one process of plain torch and with DeepSpeed's own logs."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import monitor_job as job
import pipeline_job
from forks import run_script
from launch import ROOT

TABLES = ("embed", "positions", "head")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("monitor")
    (directory / "log").write_text(run_script(job.__file__, directory, ranks=4))
    return directory


@pytest.fixture(scope="module")
def seen(out):
    return json.loads((out / "seen.json").read_text())


@pytest.fixture(scope="module")
def alone():
    """Runs each step in one process of plain torch, on the micro batches of both data-parallel
    ranks."""
    model = job.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.LR)
    steps = []
    for of_ranks in zip(job.batches(0), job.batches(1), strict=True):
        micro_batches = torch.cat(of_ranks)
        optimizer.zero_grad()
        loss = torch.stack([model(ids) for ids in micro_batches]).mean()
        loss.backward()
        norms = {name: getattr(model, name).weight.grad.norm().item() for name in TABLES}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        unique = sum(len(torch.unique(ids)) for ids in micro_batches)
        steps.append(
            {"loss": loss.item(), "norms": norms, "ratio": unique / of_ranks[0].numel() / 2}
        )
    return steps


@pytest.mark.parametrize("case", job.CASES)
def test_loss_norms_and_ids_are_those_of_one_process(seen, alone, case):
    tolerance = 1e-2 if case == "bf16" else 1e-5
    rows = seen[case]["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["at"] for row in rows] == [
        8,
        16,
        24,
        32,
    ]  # By samples, 2 x 2 per step.
    for row, expected in zip(rows, alone, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        norms = {n: norm for n, norm in expected["norms"].items() if n in row["grad_norm"]}
        assert len(norms) == len(TABLES) - (case == "whole tables")  # And a plain head.
        assert row["grad_norm"] == pytest.approx(norms, rel=tolerance)
        assert row["unique_ratio"] == pytest.approx({"embed": expected["ratio"], "positions": 1.0})
        assert len(row["memory"]) == 4
        tokens = 2 * job.MICRO_BATCHES * job.LENGTH  # Two data-parallel ranks.
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(tokens)


def test_a_monitor_goes_on_when_another_of_the_engine_is_closed(seen):
    assert seen["two monitors"] == [[5, 6, 7, 8], [6, 8, 10, 12]]


def test_pipeline_is_watched_where_its_schedule_updates(seen):
    (row,) = seen["pipeline"]["rows"]
    expected = pipeline_job.train_alone(clip=0.5)
    assert row["step"] == 2
    assert row["loss"] == pytest.approx(expected["losses"][1], rel=1e-5)

    # The norm of the first stage's table, shared by the last stage, after one step.
    model = pipeline_job.Alone(tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=pipeline_job.LR, eps=pipeline_job.EPS)
    stream = pipeline_job.micro_batches()
    for _ in range(2):
        optimizer.zero_grad()
        batches = [next(stream) for _ in range(pipeline_job.MICRO_BATCHES)]
        pipeline_job.mean_loss(model, batches).backward()
        norm = model.embed.weight.grad.norm().item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert row["grad_norm"] == {"tied_modules.embed": pytest.approx(norm, rel=1e-5)}
    unique = sum(len(torch.unique(ids)) for ids, _ in batches)
    ratio = unique / sum(ids.numel() for ids, _ in batches)
    assert row["unique_ratio"] == {"tied_modules.embed": pytest.approx(ratio)}


def test_deepspeed_writes_our_figures_where_it_writes_its_own(out, seen):
    rows = seen["zero3"]["rows"]
    scalars = EventAccumulator(str(out / "zero3" / "tb")).Reload()
    with (out / "zero3" / "csv" / "Train_Samples_tp_embed_grad_norm_embed.csv").open() as file:
        in_csv = [(int(step), float(value)) for step, value in list(csv.reader(file))[1:]]
    expected = [(row["at"], pytest.approx(row["grad_norm"]["embed"])) for row in rows]
    assert in_csv == expected
    norms = scalars.Scalars("Train/Samples/tp_embed/grad_norm/embed")
    assert [(e.step, e.value) for e in norms] == expected
    at = [e.step for e in scalars.Scalars("Train/Samples/lr")]
    assert [e.step for e in scalars.Scalars("Train/Samples/train_loss")] == at


def test_steps_are_sampled_as_often_as_deepspeed_prints(seen):
    assert [row["step"] for row in seen["timed"]["rows"]] == [2, 4]


def test_comms_logger_sees_our_collectives_as_its_own(out, seen):
    comms = {
        name: {int(size): count for size, count in sizes.items()}
        for name, sizes in seen["timed"]["comms"].items()
    }
    micro_batches = job.STEPS * job.MICRO_BATCHES
    forwards = micro_batches + job.STEPS  # Includes evaluations.
    ours = comms["tp_embed.all_gather"]
    logits = job.LENGTH * -(-job.V // 2) * 4
    # DeepSpeed's log of its own function for a tensor of the same size as in the lookup.
    lookup = min(comms["all_gather_into_tensor"])
    assert ours == {lookup: forwards, logits: forwards}
    hidden = job.LENGTH * job.E * 4
    assert comms["tp_embed.all_reduce"] == {hidden: micro_batches}

    # A rank sends (P-1) times its input in an all-gather, and 2 (P-1)/P times in an all-reduce.
    sent = {"all_gather": lookup + logits, "all_reduce": hidden}
    for row in seen["timed"]["rows"]:
        traffic = {operation: entry["bytes"] for operation, entry in row["traffic"].items()}
        assert traffic == {op: job.MICRO_BATCHES * size for op, size in sent.items()}
    assert re.search(r"^tp_embed\.all_gather\n +240\.0 B +12 ", (out / "log").read_text(), re.M)


def test_wall_clock_breakdown_has_our_timers(out, seen):
    timers = seen["timed"]["timers"]
    assert 0 < timers["tp_embed.all_reduce"] < timers["bwd"]
    assert timers["tp_embed.all_gather"] > 0  # Includes evaluations, unlike `fwd`.
    lines = re.findall(r"time \(ms\) \| fwd: .*", (out / "log").read_text())
    assert len(lines) == job.STEPS
    for line in lines:
        assert re.search(r"tp_embed\.all_gather: [\d.]+ \| tp_embed\.all_reduce: [\d.]+", line)


def test_a_rank_without_a_monitor_is_named(seen):
    assert seen["alone"].startswith("The ranks [1, 2, 3] have not made a `Monitor` within 0:00:02")


def test_round_robin_gradients_are_refused(seen):
    assert "`engine` must have `zero_optimization.round_robin_gradients` off" in seen["round_robin"]


def test_example(tmp_path):
    script = ROOT / "examples" / "train_monitored.py"
    output = run_script(script, tmp_path)
    for line in (
        r"Train/Samples/tp_embed/grad_norm/model\.embed_tokens +[\d.e-]+ +[\d.e-]+",
        r"Train/Samples/tp_embed/exchange_ms/all_gather +[\d.e-]+ +[\d.e-]+",
        r"tp_embed\.all_gather +[\d.]+ ms",
        r"tp_embed\.all_gather +\d+\n",
    ):
        assert re.search(line, output), line
    messages = {
        int(size): int(count)
        for count, size in re.findall(r"tp_embed\.all_gather +(\d+) x +(\d+)", output)
    }
    assert messages.pop(1_024_000) == 20  # The logits.
    assert messages.pop(112) == 1  # The ids of the first lookup are compared.
    row = 32 * 4  # Columns, bytes: of the distinct ones of 256 ids.
    assert sum(messages.values()) == 20
    assert all(size % row == 0 and size <= 0.85 * 256 * row for size in messages)
    page = (tmp_path / "report.html").read_text()
    assert "Gradient norm of each table" in page
    assert "model.embed_tokens" in page
