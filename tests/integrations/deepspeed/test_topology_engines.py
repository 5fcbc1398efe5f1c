"""Engines whose heads have the same bits at every tensor-parallel size."""

from __future__ import annotations

import pytest
import torch

from forks import run_script
from launch import ROOT

JOB = ROOT / "tests" / "jobs" / "topology_job.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("topology")
    run_script(JOB, out)
    return [torch.load(out / f"seen{rank}.pt") for rank in range(2)]


def test_losses_have_the_same_bits_at_every_tensor_parallel_size(seen):
    for of_rank in seen:
        for (size, *case), losses in of_rank.items():
            expected = seen[0][(1, *case)]
            assert torch.equal(torch.stack(losses), torch.stack(expected)), (size, case)
            # A tied table is the same however it is sharded.
            assert torch.equal(losses[0], seen[0][(1, "vocab", *case[1:])][0])


def test_losses_change(seen):
    for losses in seen[0].values():
        assert len(losses) == 3
        assert losses[0] != losses[1] != losses[2]
