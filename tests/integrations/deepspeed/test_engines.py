"""Compares engines of all kinds with one process of plain torch."""

from __future__ import annotations

import json

import pytest
import torch

import engines_job as job
from engines_gradients import REUSE
from forks import run_script
from launch import ROOT
from parity import assert_same_bits

PARITY = ROOT / "benchmarks" / "engine_parity.py"


def parity(tmp_path, *args, ranks):
    rows = tmp_path / "rows.json"
    # Fails if a row is out of tolerance.
    run_script(PARITY, "--json", rows, *args, ranks=ranks, timeout=600)
    return json.loads(rows.read_text())


def test_matrix_of_engines(tmp_path):
    rows = parity(tmp_path, ranks=2)
    assert all(row["ok"] for row in rows)
    kinds = ["stage", "strategy", "tied", "dtype", "by"]
    found = {tuple(row[kind] for kind in kinds) for row in rows}
    for stage in range(4):
        for dtype in ("fp32", "bf16")[: 2 if stage else 1]:
            for strategy in ("embed", "vocab"):
                for tied in (False, True):
                    for by in ("plan", "mpu"):
                        assert (stage, strategy, tied, dtype, by) in found
    # The docs list the same engines.
    page = (ROOT / "docs" / "parity.md").read_text()
    for row in rows:
        tied, dtype, by = "yes" if row["tied"] else "no", row["dtype"], row["by"]
        assert f"| {row['stage']} | {row['strategy']} | {tied} | {dtype} | {by}" in page
    assert page.count("\n| ") == len(rows) + 1


def test_tensor_and_data_parallel(tmp_path):
    rows = parity(tmp_path, "--few", ranks=4)
    assert {row["stage"] for row in rows} == {0, 1, 2, 3}
    assert all(row["ok"] for row in rows)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    run_script(job.__file__, out, ranks=4)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def alone():
    return pytest.approx(job.train_alone(), rel=1e-6)


def test_two_engines_with_different_gangs_in_one_process(seen):
    for rank, gangs in enumerate([([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2])]):
        assert seen[rank]["two engines"]["gangs"] == list(gangs)
        for seed, losses in enumerate(seen[rank]["two engines"]["losses"]):
            assert losses == pytest.approx(job.train_alone(seed), rel=1e-6)


def test_universal_checkpoint_of_an_engine_with_an_mpu(seen):
    for rank in range(4):
        found = seen[rank]["mpu checkpoint"]
        for stage in (3, 1):
            assert found[f"after, ZeRO {stage}"] == pytest.approx(found["before"], rel=1e-6)


def test_optimizer_and_parameters_that_were_built_before(seen, alone):
    for rank in range(4):
        assert seen[rank]["built before"] == {
            "optimizer": alone,
            "groups": alone,
            "generator": alone,
        }


def test_zero_init(seen, alone):
    for rank in range(4):
        for found in seen[rank]["zero.Init"]:
            assert found == {
                "before": (0,),
                "after": (job.V, job.E // 2),
                "hooked": (0,),
                "losses": alone,
            }
        assert "does over [0, 1, 2, 3], where" in seen[rank]["zero.Init over the gang"]


def test_zero_init_without_tensor_parallelism(seen):
    for rank in range(4):
        kind, losses = seen[rank]["zero.Init alone"]
        assert kind == "Embedding"
        assert losses[0] == pytest.approx(job.build()(job.batches(0)[0]).item(), rel=1e-6)


def test_error_of_one_rank_at_zero_3_ends_all_that_fetch_with_it(seen):
    for rank in range(4):
        hook, draw = seen[rank]["fail alone at ZeRO 3"]
        assert hook.startswith("ValueError: The w" if rank == 2 else "GangError: Rank ")
        assert "must have no hook that expects the whole table" in hook
        assert draw.startswith("MemoryError" if rank == 2 else "GangError: ")
        assert "no memory" in draw


def test_ranks_meet_once_and_strategies_are_chosen_once(seen):
    for rank in range(4):
        expected = {"sent": ["tp_embed.all_gather", "tp_embed.all_gather"], "chosen": 1}
        assert seen[rank]["meetings"] == expected


def test_tp_model_init(seen):
    for rank in range(4):
        assert seen[rank]["tp_model_init"] == ("ShardedEmbedding", [job.V, job.E // 2])


def test_sparse_gradients(seen):
    expected = job.train_alone(momentum=0.0)
    for rank in range(4):
        assert seen[rank]["sparse"] == pytest.approx(expected, rel=1e-6)


def test_data_parallel_ranks_exchange_the_rows_that_were_used(seen):
    """DeepSpeed gathers the numbers, then the ids and the rows."""
    width = job.E // 2
    for rank in range(4):
        found = seen[rank]["sparse volumes"]
        dense, sparse = found["dense"], found["sparse"]
        assert sparse["losses"] == pytest.approx(dense["losses"], rel=1e-6)
        gathered = [(8, 2 * job.STEPS)]
        gathered += [(n * size, 1) for n in found["rows"] for size in (8, width * 4)]
        assert sparse["bytes"]["all_gather"] == sorted(gathered)
        assert "all_gather" not in dense["bytes"]
        # The rest is reduced as before, in one bucket without the table.
        reduced = {kind: set(found[kind]["bytes"]["all_reduce"]) for kind in ("dense", "sparse")}
        ((whole, steps),) = reduced["dense"] - reduced["sparse"]
        assert reduced["sparse"] - reduced["dense"] == {(whole - 500 * width * 4, steps)}
        assert steps == job.STEPS


def test_deepspeed_does_not_clip_sparse_gradients(seen):
    """Shows why we refuse it. Once this fails, it can be allowed."""
    for rank in range(4):
        unclipped, clipped = seen[rank]["sparse clipped unchecked"]
        assert clipped == unclipped > 100 * 1e-3 * job.LR


@pytest.mark.parametrize("name", REUSE)
def test_gradients_in_the_same_memory(seen, name):
    for rank in range(4):
        (losses, table), (reused_losses, reused_table) = seen[rank]["reuse_grad"][name]
        assert losses == reused_losses
        assert_same_bits(reused_table, table, "tables")


def test_gradients_in_the_same_memory_at_zero_0_with_data_parallel_ranks(seen):
    """Shows why we refuse it. Once this fails, it can be allowed."""
    for rank in range(4):
        (_, table), (_, reused) = seen[rank]["reuse_grad unchecked"]
        assert not torch.equal(table, reused)


def test_init_does_not_depend_on_the_engine(seen):
    autotp, two, one = seen[0]["init"]
    assert autotp == pytest.approx(two, rel=1e-6)
    assert two == pytest.approx(one, rel=1e-6)
    without = job.build()(job.batches(0)[0]).item()
    assert one[0] != pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "bf16": "ValueError: `zero_optimization.stage` must be 1, 2 or 3 for `bf16` with tensor",
        "local storage": "ValueError: `checkpoint.use_node_local_storage` must be false with ten",
        "sparse": "ValueError: `zero_optimization.stage` must be 0 for sparse gradients, which",
        "sparse clipped": "ValueError: `gradient_clipping`, which is 1.0 by default, must be",
        "sparse clipped by default": "ValueError: `gradient_clipping`, which is 1.0 by",
        "reuse": "ValueError: `zero_optimization.stage` must be 1, 2 or 3 for `reuse_grad` with",
        "reuse alone": "ValueError: `zero_optimization.stage` must be 1, 2 or 3 for `reuse_grad`",
        "reuse pipeline": "ValueError: `zero_optimization.stage` must be 1, 2 or 3 for `reuse_gr",
        "reuse sparse": "ValueError: `tp_embed.reuse_grad` of the DeepSpeed config is True: must",
        "reuse tied": "ValueError: `reuse_grad` must be False for the tables of pipeline stages",
        "dedup": "ValueError: `tp_embed.dedup` of the DeepSpeed config is 'on': Input should be",
        "lamb": "ValueError: The optimizer of the table 'embed' must treat each item by itself",
        "adafactor": "ValueError: The optimizer of the table 'embed' must treat each item by itse",
        "spec": "ValueError: The table 'embed' must not match `tensor_parallel.partition_config`",
        "head": "ValueError: `tensor_parallel.vocab_parallel_lm_head` must not be true where `tp_",
        "parsed": "ValueError: `model` must not have been processed by AutoTP, which may have",
        "inference": "ValueError: AutoTP's mode must be TRAINING, but is INFERENCE instead, which",
        "key": "ValueError: `tp_embed.stratgy` is not a key of the DeepSpeed config. The section",
        "value": "ValueError: `tp_embed.rules.embed` of the DeepSpeed config is 'columns': Input",
        "type": "ValueError: `tp_embed.tie_head` of the DeepSpeed config is 'yes': Input should be",
        "init": "ValueError: `tp_embed.init` of the DeepSpeed config is 'normale': an init functi",
        "module": "ValueError: `tp_embed.init` of the DeepSpeed config is 'no_such_module.normal'",
        "path": "ValueError: `tp_embed.strategy` of the DeepSpeed config is 'rows': Input should",
        "args": "ValueError: `tp_embed.strategy` of the DeepSpeed config is 'rows': Input should",
        "no config": "ValueError: The DeepSpeed config must be given as either `config` or `args.",
        "no model": "ValueError: `model` must be a `torch.nn.Module`, but is None instead.",
        "section": "GangError: The ranks of DeepSpeedGang(",
        "seed": "GangError: The ranks of DeepSpeedGang(",
        "sparse table": "ValueError: `zero_optimization.stage` must be 0 for sparse gradients",
        "logits": "ValueError: `model` must compute its loss with its `loss_function`, but",
        "pipeline": "The tables of a `PipelineModule` must be sharded by its specs, since it",
        "model after": "Embedding",
    }.items(),
)
def test_refused(seen, what, message):
    for rank in range(4):
        assert seen[rank]["refusals"][what].startswith(message)


def test_error_of_one_rank_ends_all(seen):
    for rank in range(4):
        found = seen[rank]["refusals"]["alone"]
        assert "`zero_optimization.stage` must be 0 for sparse gradients" in found
        assert found.startswith("ValueError: `zero" if rank % 2 else "GangError: Rank 1 of DeepSp")


def test_bytes_of_table_and_head(tmp_path):
    """Includes gradients, master copies and moments. AutoTP's config decides what it cuts; the
    plugin always cuts both."""
    rows, vocab_size, dim = tmp_path / "rows.json", 4000, 64
    whole = 5 * vocab_size * dim * 4
    half = whole // 2
    expected = {
        "untied-alone": (whole, half),
        "untied-auto": (half, half),
        "untied-preset-alone": (whole, whole),
        "untied-preset-auto": (half, half),
        "tied-alone": (half, 0),
        "tied-auto": (half, 0),
        "tied-preset-alone": (whole, 0),
        "tied-preset-auto": (half, 0),
    }
    sizes = [f"--vocab-size={vocab_size}", f"--dim={dim}"]
    program = ROOT / "benchmarks" / "memory.py"
    run_script(program, *expected, *sizes, f"--json={rows}")
    found = {row["case"]: (row["table"], row["head"]) for row in json.loads(rows.read_text())}
    assert found == expected
