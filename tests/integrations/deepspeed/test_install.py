"""Programs that know nothing of tp_embed: a section of their DeepSpeed config is enough."""

from __future__ import annotations

import subprocess
import sys

import deepspeed
import pytest
import torch

import engines_job
import hf_trainer_job
import install_job
from forks import run_script
from hf_models import build as build_hf
from launch import ROOT, deepspeed_command, run
from tp_embed.integrations.deepspeed import install, uninstall


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("install")
    run_script(install_job.__file__, directory)
    return [torch.load(directory / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def losses():
    """Returns the losses in one process of plain torch."""
    model, losses = engines_job.build(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=engines_job.LR, momentum=0.9)
    for ids in engines_job.batches(0):
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("program", ["positions", "args", "optimizer"])
def test_engine_of_a_program_shards_its_tables(seen, losses, program):
    for rank in seen:
        assert rank[program]["losses"] == losses
        assert rank[program]["kinds"] == ["VocabShardedEmbedding", "OutputHead"]


def test_accelerate_prepares_and_saves_as_without(seen):
    for rank in seen:
        alone = rank["accelerate alone"]["losses"]
        assert rank["accelerate"]["losses"] == pytest.approx(alone, rel=1e-6)
        assert rank["accelerate"]["kinds"] == ["VocabShardedEmbedding", "OutputHead"]
    assert seen[0]["accelerate"]["table"].shape == (engines_job.V, engines_job.E)


def test_trainer_needs_no_callback(seen, tmp_path):
    alone = hf_trainer_job.train(build_hf("llama"), hf_trainer_job.arguments(tmp_path))
    for rank in seen:
        assert rank["trainer"]["losses"] == pytest.approx(hf_trainer_job.losses(alone), rel=1e-5)
        assert "VocabShardedEmbedding" in rank["trainer"]["kinds"]


def test_config_without_a_section_is_left_alone(seen, losses):
    assert seen[0]["no section"] == {"losses": losses, "kinds": []}


def test_section_that_nothing_reads_is_refused(seen):
    assert all("tables would stay whole. Call `tp_embed" in rank["without"] for rank in seen)


def test_uninstall_restores_what_was_there(seen):
    assert all(rank["restored"] for rank in seen)
    assert all(rank["callbacks"] == ["DefaultFlowCallback"] for rank in seen)


def test_function_of_another_library_around_ours_stays(monkeypatch):
    plain = deepspeed.initialize
    install()
    ours = deepspeed.initialize
    assert ours is not plain
    monkeypatch.setattr(deepspeed, "initialize", lambda *args, **kwargs: ours(*args, **kwargs))
    around = deepspeed.initialize
    uninstall()
    assert deepspeed.initialize is around
    with pytest.raises(AssertionError, match="requires a model"):
        deepspeed.initialize()
    install()
    assert deepspeed.initialize is around
    monkeypatch.undo()
    uninstall()
    assert deepspeed.initialize is plain


PROGRAM = """
import sys
import deepspeed
import other  # A module beside the program.
import torch
from torch import nn

deepspeed.init_distributed()
torch.manual_seed(0)  # As every rank of a tensor-parallel group needs.
model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
config = {
    "train_micro_batch_size_per_gpu": 1,
    "tensor_parallel": {
        "autotp_size": 2,
        "partition_config": {"use_default_specs": False, "layer_specs": []},
    },
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
    "tp_embed": {},
}
engine, *_ = deepspeed.initialize(model=model, config=config)
print("ARGV", __name__, sys.argv[1:], type(model[0]).__name__)
"""


def test_program_is_run_as_it_is(tmp_path):
    """By the launcher that puts `--local_rank` in front."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "other.py").touch()
    command = deepspeed_command("--module", "tp_embed.run", tmp_path / "program.py", "--x", "1")
    output = run([word for word in command if word != "--no_local_rank"])
    for rank in range(2):
        said = f"ARGV __main__ ['--local_rank={rank}', '--x', '1'] ShardedEmbedding"
        assert said in output


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--help"]])
def test_usage(arguments):
    command = [sys.executable, "-m", "tp_embed.run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "usage: python -m tp_embed.run (SCRIPT | -m MODULE)" in done.stderr
