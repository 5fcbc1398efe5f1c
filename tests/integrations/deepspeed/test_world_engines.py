"""Engines with a table that is sharded over all ranks, against one process of plain torch."""

from __future__ import annotations

import pytest
import torch

import world_job as job
from forks import run_script


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    run_script(job.__file__, out, ranks=4)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize(
    ("case", "dp_size", "options"),
    [
        ("dp", 4, {}),
        ("dp, clipped", 4, {"clip": job.CLIP}),
        ("tp x dp", 2, {}),
        ("autotp", 2, {"clip": job.CLIP}),
        ("tp x dp, clipped", 2, {"clip": job.CLIP, "accumulated": 2}),
    ],
)
def test_losses_are_those_of_one_process(seen, case, dp_size, options):
    expected = job.alone(dp_size, **options)
    if options:  # Clipping has an effect.
        assert expected != job.alone(dp_size, **{**options, "clip": 0.0})
    for rank in seen:
        assert rank[case] == pytest.approx(expected, rel=2e-6)


def test_sparse_gradients_of_a_layer_of_the_user(seen):
    for rank in seen:
        expected, found = rank["sparse"]
        assert found == pytest.approx(expected, rel=2e-6)


def test_resumes_from_a_checkpoint_by_another_placement(seen):
    for rank in seen:
        found = rank["resumed"]
        assert found["losses"] == pytest.approx(job.alone(2), rel=2e-6)
        assert found["again"] == found["losses"][1:]
        assert found["shape"] == (job.BUCKETS, job.E)
        assert torch.equal(found["exported"], found["saved"])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stage", "must be at ZeRO 0, in fp32 and without sequence parallelism for tables"),
        ("bf16", "['ngram'], but has {'bf16': True}"),
        ("lamb", "the table 'ngram'"),
        ("sum", "'ngram' must have `grad_reduction='mean'`, as an engine averages gradients"),
        ("tied", "'ngram' must not be shared with an output head for the strategy 'world'"),
        ("trainer", "`tp_embed.rules` must not have 'world' with the Trainer or Accelerate"),
        ("export", "`tp_embed.integrations.deepspeed.export()` must save the whole model"),
        ("plain", "Build the engine by `tp_embed.integrations.deepspeed.initialize()`"),
    ],
)
def test_refusals(seen, case, message):
    for rank in seen:
        assert message in rank["refusals"][case]
