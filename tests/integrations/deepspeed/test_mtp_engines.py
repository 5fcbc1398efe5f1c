"""Compares engines that train models with several heads over one table with one process."""

from __future__ import annotations

import pytest
import torch

import mtp_job as job
from forks import run_script


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("mtp")
    run_script(job.__file__, out, ranks=2)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", job.CASES)
def test_losses_are_those_of_one_process(seen, case):
    alone = job.train_alone(job.CASES[case]["name"])
    for of_rank in seen:
        assert of_rank[case] == pytest.approx(alone, rel=1e-5)
