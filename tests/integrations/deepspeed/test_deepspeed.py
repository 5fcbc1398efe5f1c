"""Tables on real DeepSpeed engines at ZeRO 1 over two ranks."""

from __future__ import annotations

import sys

import pytest
import torch

import deepspeed_job as job
from forks import run_script
from launch import run
from llama import DIM, VOCAB

SHARDED = [name for name, case in job.CASES.items() if case["strategy"]]
UNTIED = [name for name in SHARDED if name in ("embed", "vocab")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("deepspeed")
    run_script(job.__file__, out)
    return out


@pytest.fixture(scope="module")
def seen(out):
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return {tied: job.train_alone(tied) for tied in (False, True)}


@pytest.mark.parametrize("name", UNTIED)
def test_plugin_changes_nothing_but_memory(seen, name):
    plain = seen[0]["autotp alone"]
    assert seen[0][name]["losses"] == plain["losses"]
    for key, tensor in plain["state"].items():
        torch.testing.assert_close(seen[0][name]["state"][key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHARDED)
def test_training_is_that_of_one_process(seen, alone, name):
    expected = alone[job.CASES[name]["tied"]]
    for rank in range(2):
        assert seen[rank][name]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert seen[rank][name]["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    state = seen[0][name]["state"]
    assert set(state) == set(expected["state"])
    for key, tensor in expected["state"].items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", SHARDED)
def test_consolidated_state_is_whole(seen, name):
    expected = job.build(job.CASES[name]["tied"]).state_dict()
    assert seen[1][name]["start"] is None
    for key, tensor in expected.items():
        assert torch.equal(seen[0][name]["start"][key], tensor), key
    # So is the state dict with hooks.
    for rank in range(2):
        table = seen[0][name]["state"]["model.embed_tokens.weight"]
        assert torch.equal(seen[rank][name]["hooked table"], table)
    # Gathering puts the shards back.
    for rank in range(2):
        assert seen[rank][name]["table after gathering"] == seen[rank][name]["table"][1]


def test_tables_are_tensor_parallel_layers(seen):
    rows, dim = VOCAB, DIM
    for rank, rows_of_rank in enumerate([51, 50]):
        assert seen[rank]["autotp alone"]["table"] == ("Embedding", (rows, dim))
        assert seen[rank]["embed"]["table"] == ("ShardedEmbedding", (rows, dim // 2))
        assert seen[rank]["vocab"]["table"] == ("VocabShardedEmbedding", (rows_of_rank, dim))
        for name in SHARDED:
            assert seen[rank][name]["is layer"]
            assert seen[rank][name]["copy is layer"]
    assert "strategy 'vocab', tied to lm_head" in seen[0]["tied, vocab"]["report"]


def test_gangs_come_from_groups_mpu_and_engine(seen):
    for rank in range(2):
        gangs = seen[rank]["gangs"]
        expected = f"DeepSpeedGang(rank={rank}, size=2, device='cpu', global_ranks=[0, 1])"
        assert gangs["mpu"] == gangs["old mpu"] == expected
        assert seen[rank]["embed"]["from engine"] == [0, 1]
        for key, message in {
            "no mpu": "TypeError: `mpu` must have `get_tensor_model_parallel_group()`",
            "no tp": "GangError: `engine` has no tensor-parallel group. Set `tensor_parallel.",
            "not a divisor": "ValueError: `tp_size` must divide the number of processes (2), but",
            "other size": "ValueError: `tp_size` must be 2, the size of the tensor-parallel",
        }.items():
            assert gangs[key].startswith(message)
        assert "do not exist yet. Pass `tp_size`" in seen[rank]["too early"]


@pytest.mark.parametrize("name", SHARDED)
def test_universal_checkpoint_merges_the_table_and_its_moments(out, seen, alone, name):
    universal = out / f"{name} universal"
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", str(out / name / "end"), "--output_folder", str(universal)]
    run([*convert, *folders, "--num_extract_workers=1", "--num_merge_workers=1"])

    directory = universal / "zero" / "model.embed_tokens.weight"
    table, *moments = [
        torch.load(directory / f"{part}.pt", weights_only=False)["param"]
        for part in ("fp32", "exp_avg", "exp_avg_sq")
    ]
    assert torch.equal(table, seen[0][name]["state"]["model.embed_tokens.weight"])
    expected = alone[job.CASES[name]["tied"]]["moments"]
    torch.testing.assert_close(moments[0], expected["exp_avg"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments[1], expected["exp_avg_sq"], rtol=1e-4, atol=1e-8)


def test_fused_loss_is_that_of_deepspeed(seen):
    """Uses several chunks, and a number of rows that two ranks do not divide."""
    for rank in range(2):
        ours, theirs = seen[rank]["fused losses"]
        torch.testing.assert_close(ours, theirs)
