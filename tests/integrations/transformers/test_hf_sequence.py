"""Compares Trainers with Ulysses and a fused loss with the Trainer in one process."""

from __future__ import annotations

import pytest
import torch

import sequence_trainer_job as job
from forks import run_script


@pytest.mark.parametrize("case", job.CASES)
def test_losses_are_those_of_one_process(case, tmp_path):
    run_script(job.__file__, tmp_path, case)
    expected = job.train(case, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"seen{rank}.pt", weights_only=True)
        assert found == pytest.approx(expected, rel=1e-5)
