"""Compares engines on four ranks, with positions that are split over sequence groups and tables
that are cut over tensor-parallel groups, with one process that holds all positions."""

from __future__ import annotations

import pytest
import torch

import ulysses_job as job
from forks import run_script


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("ulysses")
    run_script(job.__file__, out, ranks=4)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("name", job.CASES)
def test_losses_are_those_of_one_process(seen, name):
    alone = job.train_alone(job.CASES[name].get("tied", True))
    for of_rank in seen:
        assert of_rank[name] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_tables_stay_whole_with_the_groups_of_deepspeed(seen, stage):
    """DeepSpeed's module for sequence groups calls them model-parallel groups as well."""
    alone = job.train_alone(tied=True)
    for of_rank in seen:
        assert of_rank[f"whole, ZeRO {stage}"] == pytest.approx(alone, rel=1e-5)


def test_what_would_go_wrong_is_refused(seen):
    for rank, of_rank in enumerate(seen):
        message = of_rank["one group"]
        assert message.startswith("The tensor-parallel ranks of `mpu`, [0, 1, 2, 3], must be in")
        assert "`get_sequence_data_parallel_group()`" in message
        message = of_rank["outside of zero.Init"]
        assert f"over data-parallel and sequence ranks, {[rank % 2, rank % 2 + 2]}" in message
        assert f"`mpu.get_data_parallel_group()`, [{rank}], and leave out gradients" in message
