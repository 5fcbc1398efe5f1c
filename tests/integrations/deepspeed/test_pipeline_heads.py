"""Compares pipelines of three stages that all use one table, with a head on the middle stage and
one on the last, with one process."""

from __future__ import annotations

import pytest
import torch

import pipeline_heads_job as job
from forks import run_script

RANKS = 2 * job.STAGES


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("heads")
    run_script(job.__file__, out, ranks=RANKS)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", job.CASES)
def test_training_is_that_of_one_process(seen, name):
    clip = job.CASES[name]["clip"]
    alone = job.train_alone(clip)
    assert min(alone["norms"]) > clip  # Clipping takes effect.
    for of_rank in seen:
        found = of_rank[name]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        if job.CASES[name]["stage"] > 0:
            assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        torch.testing.assert_close(found["table"], alone["table"], rtol=1e-5, atol=1e-5)
        assert torch.equal(found["table"], seen[0][name]["table"])


@pytest.mark.parametrize("name", job.CASES)
def test_all_stages_hold_the_table(seen, name):
    stages = [of_rank[name]["pipeline stage"] for of_rank in seen]
    assert stages == [0, 0, 1, 1, 2, 2]
