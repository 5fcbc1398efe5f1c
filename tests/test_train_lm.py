"""The main job and its Hydra configs, started as users start them."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf

import corpus
from forks import run_script
from launch import (
    BIN,
    ROOT,
    deepspeed_command,
    remove_shared_memory,
    run,
    start,
    torchrun_command,
)

SCRIPT = ROOT / "examples" / "train_lm.py"
EVALUATE = ROOT / "examples" / "evaluate_lm.py"
TINY = [
    "model=llama_tiny",
    "data.vocab_size=1000",
    "data.max_bytes=1500000",
    "data.seq_len=32",
    "eval_batches=2",
    "steps=30",
    "checkpoint_every=15",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def whole_run(directory):
    """Runs the default embedding without interruption, in runs/whole."""
    output = run_script(SCRIPT, *TINY, "name=whole", cwd=directory)
    return directory / "runs" / "whole", output


def losses(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return [(int(row["step"]), row["loss"]) for row in csv.DictReader(file)]


def test_run_trains_and_reports(whole_run):
    run_dir, output = whole_run
    result = json.loads((run_dir / "result.json").read_text())
    assert [step for step, _ in losses(run_dir)] == list(range(1, 31))
    assert result["last_loss"] < result["first_loss"]
    assert result["table_bytes_per_rank"] * 2 == result["table_bytes_replicated"]
    assert "model.embed_tokens (1000 x 64): strategy 'embed'; 0.12 MiB on this rank" in output
    assert "30/30" in output  # the progress bar
    assert "tokens_s=" in output
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step*")) == ["step30"]
    assert OmegaConf.load(run_dir / "config.yaml").steps == 30
    assert "name=whole" in (run_dir / ".hydra" / "overrides.yaml").read_text()
    assert {p.name for p in (run_dir / "logs").iterdir()} == {"rank-00000.log", "rank-00001.log"}


def test_transformers_loads_the_exported_model(whole_run, directory):
    run_dir, _ = whole_run
    output = run([sys.executable, str(EVALUATE), str(run_dir)], directory)
    match = re.search(r"loss ([\d.]+) by transformers, ([\d.]+) by the engine", output)
    here, there = match.groups()
    assert float(here) == pytest.approx(float(there), rel=1e-5)


def test_resumed_run_continues_exactly(whole_run, directory):
    """Ctrl-C as soon as there is a checkpoint, then `resume=true`."""
    expected, _ = whole_run
    run_dir = directory / "runs" / "broken"
    command = deepspeed_command(SCRIPT, *TINY, "name=broken")
    process = start(command, cwd=directory)
    latest = run_dir / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what the terminal sends on Ctrl-C
    output, _ = process.communicate(timeout=60)
    remove_shared_memory(command)
    assert latest.read_text() == "step15", output
    assert not (run_dir / "result.json").exists(), output

    run_script(SCRIPT, *TINY, "name=broken", "resume=true", cwd=directory)
    assert losses(run_dir) == losses(expected)


@pytest.mark.parametrize(
    "choices",
    [
        ["embedding=vocab_sharded", "init=xavier_uniform", "deepspeed=zero0"],
        [
            "embedding=auto",
            "init=normal",
            "init.std=0.01",
            "model.tie_word_embeddings=true",
            "deepspeed=zero3",
        ],
        ["+embedding.tables={model.embed_tokens:{optimizer:lazy_adam}}"],
    ],
)
def test_torchrun_and_other_choices_work(directory, choices):
    command = torchrun_command(SCRIPT, *TINY, "name=other", "steps=6", *choices)
    output = run(command, cwd=directory)
    result = json.loads((directory / "runs" / "other" / "result.json").read_text())
    assert result["last_loss"] < result["first_loss"]
    assert "strategy 'vocab'" in output
    run([sys.executable, str(EVALUATE), "runs/other"], directory)


def test_experiment_goes_on_from_a_universal_checkpoint_of_another_stage(directory):
    """Also with another architecture, another optimizer, and offloading."""
    options = ["experiment=tied_vocab", "debug=tiny", "model=qwen3_tiny", "optimizer=adam"]
    first = ["name=moved", "deepspeed=zero2", "offload=optimizer"]
    run_script(SCRIPT, *options, *first, cwd=directory)
    run_dir = directory / "runs" / "moved"
    run([sys.executable, str(EVALUATE), str(run_dir)], directory)

    universal = directory / "runs" / "universal" / "checkpoints"
    convert = [str(BIN / "tp-embed"), "convert", str(run_dir / "checkpoints"), str(universal)]
    run([*convert, "--to", "universal"], directory)
    then = ["name=universal", "checkpoint=universal", "resume=true", "steps=6"]
    output = run_script(SCRIPT, *options, *then, cwd=directory)
    assert "resumed after step 4" in output
    assert [step for step, _ in losses(universal.parent)] == [5, 6]


def test_sweep_trains_each_choice_from_the_same_model(directory):
    options = ["experiment=sharded_vs_replicated", "debug=tiny", "precision=bf16", "optimizer=sgd"]
    run_script(SCRIPT, *options, cwd=directory)
    results = {
        path.parent.name: json.loads(path.read_text())
        for path in (directory / "runs" / "sharded_vs_replicated").rglob("result.json")
    }
    assert len(results) == 3
    assert len({result["first_loss"] for result in results.values()}) == 1
    sharded, whole = sorted({result["table_bytes_per_rank"] for result in results.values()})
    assert 2 * sharded == whole


def test_four_ranks_are_two_gangs(directory):
    run_script(SCRIPT, *TINY, "name=four", "steps=6", "deepspeed=zero2", ranks=4, cwd=directory)
    result = json.loads((directory / "runs" / "four" / "result.json").read_text())
    assert result["last_loss"] < result["first_loss"]
    assert result["table_bytes_per_rank"] * 2 == result["table_bytes_replicated"]
    run([sys.executable, str(EVALUATE), "runs/four"], directory)


def test_misspelt_key_is_an_error_that_lists_the_keys(directory):
    with pytest.raises(AssertionError, match=r"Key 'stdd' not in 'Normal'[^$]*Did you mean `std`"):
        run([sys.executable, str(SCRIPT), "init=normal", "init.stdd=0.01"], cwd=directory)


def test_runs_that_make_the_same_corpus_do_not_meet(tmp_path):
    """Neither finds a corpus, and both make it."""
    both = threading.Barrier(2)

    def say(text):
        if text.startswith("training"):
            both.wait(60)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(corpus.load, tmp_path / "cache", 300, 100_000, say) for _ in range(2)]
    first, second = [job.result() for job in jobs]
    assert (first.train == second.train).all()
    assert first.vocab_size == second.vocab_size == 300
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_run_of_the_same_name_sets_checkpoints_aside(directory):
    run_dir = directory / "runs" / "again"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text("step7")
    run_script(SCRIPT, *TINY, "name=again", "steps=2", "tp_size=1", ranks=1, cwd=directory)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step2"
    assert (run_dir / "checkpoints.previous" / "latest").read_text() == "step7"


def test_resume_needs_a_checkpoint(directory):
    options = *TINY, "name=nothing", "resume=true", "tp_size=1"
    with pytest.raises(AssertionError, match=r"needs a checkpoint in .*, but there is none"):
        run_script(SCRIPT, *options, ranks=1, cwd=directory)
