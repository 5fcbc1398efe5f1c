"""Compares the planner with DeepSpeed engines: their memory and communication."""

from __future__ import annotations

import json

import pytest
import torch

import plan as benchmark
from forks import run_script
from launch import ROOT
from tp_embed.plan import Network, Setup
from tp_embed.plan.traffic import Transfer


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan")
    job = ROOT / "benchmarks" / "plan.py"
    run_script(job, "--part", "engines", "--json", out, ranks=4, timeout=600)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: benchmark.name(*case))
def test_engine_holds_and_sends_what_is_planned(measured, case):
    setup, strategy = case
    rows = [rank[benchmark.CASES.index(case)] for rank in measured]
    assert all(row["strategy"] == strategy for row in rows)
    planned = benchmark.plan(setup, strategy)
    # ZeRO 1 and 2 pad the flat Parameters to twice the ranks, ZeRO 3 pads each one to the ranks.
    padding = 0 if setup.vocab_size == benchmark.EVEN["vocab_size"] else 2 * setup.dp_size
    per_item = 4 * 5  # Weight, gradient, master copy and two moments.
    assert 0 <= max(row["held"] for row in rows) - planned.states <= padding * per_item
    assert 0 <= max(row["moments"] for row in rows) - planned.moments <= padding * 8
    wanted = benchmark.payloads(planned)
    for row in rows:
        assert set(row["sent"]) <= set(wanted)
    for operation, payload in wanted.items():
        sent = max(row["sent"].get(operation, 0) for row in rows)
        assert 0 <= sent - payload <= padding * 4 * setup.accumulation_steps


def test_fit_finds_the_network_that_times_are_of():
    network, setup = Network(3e9, 20e-6), Setup(1000, 8, tp_size=4)
    for operation in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all"):
        transfers = [Transfer("", "forward", operation, "tp", 4, n) for n in (2**10, 2**20, 2**24)]
        seconds = torch.tensor([network.seconds(setup, t) for t in transfers], dtype=torch.float64)
        found = benchmark.fit(transfers, seconds)
        assert (found.bandwidth, found.latency) == pytest.approx((3e9, 20e-6))
    # Faster than any link.
    assert benchmark.fit(transfers[:2], torch.tensor([1e-6, 2e-3])).latency == 0.0
