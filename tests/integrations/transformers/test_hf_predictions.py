"""Trainers whose models have the logits of each rank's classes make no wrong predictions."""

from __future__ import annotations

import pytest
import torch

import predictions_job as job
from forks import run_script


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("predictions")
    run_script(job.__file__, out)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


def test_metrics_and_predictions_of_each_ranks_logits_are_refused(seen):
    for found in seen:
        assert found["metrics"].startswith("`compute_metrics` must be given the logits of all clas")
        for name in ("predict", "kept"):
            assert found[name].startswith("Predictions must be made from the logits of all classes")
        for name in ("metrics", "predict", "kept"):
            assert "Leave out `shard_logits`" in found[name]


def test_losses_and_metrics_that_know_of_the_ranks_are_those_of_one_process(seen, tmp_path):
    losses, classes = job.losses(tmp_path, False), job.classes(tmp_path, False)
    assert len(losses) == len(classes) > 0
    for found in seen:
        assert found["losses"] == found["evaluation"] == pytest.approx(losses, rel=1e-5)
        assert found["classes"] == pytest.approx(classes, rel=1e-6)
