"""Engines with options that mix up shards, and models whose tables AutoTP cuts itself."""

from __future__ import annotations

import pytest
import torch

import mixing_job as job
from engines_job import LR, batches, build
from forks import run_script


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("mixing")
    run_script(job.__file__, out, ranks=2, timeout=400)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", job.MODELS)
@pytest.mark.parametrize("stage", [1, 3])
def test_tables_with_a_column_for_each_head_are_left_to_autotp(seen, name, stage):
    alone = pytest.approx(job.train_alone(name), rel=1e-5)
    for of_rank in seen:
        for how in (None, {}, {"strategy": "vocab"}):
            losses, report = of_rank[f"{name}, ZeRO {stage}, {how}"]
            assert losses == alone
            if how is not None:
                assert "relative_attention_bias (32 x 4): strategy 'none' (left to AutoTP" in report
                assert "shared (36 x 16): strategy 'vocab'" in report


def test_options_that_mix_shards_up_are_refused(seen):
    keys = {
        "hpZ": "`zero_optimization.zero_hpz_partition_size` must be 1 with tensor parallelism",
        "qgZ": "`zero_optimization.zero_quantized_gradients` must be false with",
        "ZenFlow": "`zero_optimization.zenflow` must be left out with",
        "sequence parallelism": "`sequence_parallel_size` must be 1 with",
        "mesh": "`sequence_parallel_size` must be 1 with",
        "AutoSP": "`compile.passes` must be without 'autosp' with",
        "hybrid engine": "`hybrid_engine` must be left out with",
        "LAMB": "must treat each item by itself, but is `Lamb` instead",
        "Adafactor": "must treat each item by itself, but is `Adafactor` instead",
        "Muon": "must treat each item by itself, but is `Muon` instead",
        "made by a function": "must treat each item by itself, but is `Adafactor` instead",
        "rule": "must be 'none', but is 'embed' instead: AutoTP cuts its columns",
    }
    for of_rank in seen:
        assert of_rank["refusals"].keys() == keys.keys()
        for name, message in of_rank["refusals"].items():
            assert keys[name] in message, name


def test_options_that_do_not_train_as_one_process(seen):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    alone = []
    for ids in batches(0):
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        alone.append(loss.item())
    for of_rank in seen:
        for name, losses in of_rank["right"].items():
            assert losses == pytest.approx(alone, rel=1e-5), name


def test_full_values_of_a_table_are_set_and_got(seen):
    table = torch.arange(1.0, 185.0).view(23, 8)
    model = build()
    model(batches(0)[0]).backward()
    for of_rank in seen:
        for found in of_rank["fragments"]:
            for name in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(found[name], table, rtol=0, atol=0)
            torch.testing.assert_close(found["gradient"], model.embed.weight.grad)
            assert "must be given the whole table" in found["read"]
            assert "`value` must have the shape of the table, (23, 8)" in found["shape"]
