"""Compares trainers of TRL over two tensor-parallel ranks with TRL in one process."""

from __future__ import annotations

import pytest
import torch

import trl_job as job
from forks import run_script

MESSAGES = {
    "groups": r"steps_per_generation` must be divisible by the 8 generations .* but is 4 instead",
    "batch": "`scale_rewards` .* must be 'group' with tensor parallelism, but is 'batch'",
    "aggregation": "`multi_objective_aggregation` .* must be 'sum_then_normalize'",
    "advantages": "`normalize_advantages` .* must be False with tensor parallelism",
    "entropy": r"`top_entropy_quantile` .* must be 1\.0 with tensor parallelism",
    "KTO, cut head": 'AutoTP would cut `lm_head` of the reference.* Set `"preset_model"`',
    "RLOO, cut head": 'AutoTP would cut `lm_head` of the reference.* Set `"preset_model"`',
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("trl")
    job.save_model(out)
    run_script(job.__file__, out)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", job.CASES)
def test_trainer_computes_what_it_does_alone(seen, case, tmp_path):
    job.save_model(tmp_path)
    expected = job.train(case, tmp_path)
    for rank in range(2):
        found = seen[rank][case]
        assert isinstance(found, dict), found
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert len(expected["loss"]) == job.STEPS


@pytest.mark.parametrize("case", job.REFUSED)
def test_what_would_train_otherwise_is_refused(seen, case):
    for rank in range(2):
        with pytest.raises(ValueError, match=MESSAGES[case]):
            raise ValueError(seen[rank][case])
