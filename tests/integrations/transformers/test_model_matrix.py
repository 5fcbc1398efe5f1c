"""Models of transformers train the same when sharded, or are refused."""

from __future__ import annotations

import pytest

import model_zoo
from model_matrix import STRATEGIES, run

FEW = [
    "bart",
    "bert",
    "bloom",
    "clip",
    "ctrl",  # Changes the output of its embedding in place.
    "gemma3_text",
    "gpt2",
    "llama",
    "mixtral",
    "opt",
    "prophetnet",  # Reads the weight of its positions: refused.
    "qwen2_audio_encoder",  # Adds the weight of its positions to activations: refused.
    "qwen3",
    "t5",
]


@pytest.mark.parametrize("family", FEW)
def test_family_trains_as_it_does_whole(pool, family):
    for strategy in STRATEGIES:
        outcome = run(pool, family, strategy)
        assert outcome.what in ("same", "refused"), f"{strategy}: {outcome}"


@pytest.mark.nightly
def test_every_family_trains_as_it_does_whole(pool):
    found = {f: {s: run(pool, f, s) for s in STRATEGIES} for f in model_zoo.families()}
    outcomes = [outcome for by_strategy in found.values() for outcome in by_strategy.values()]
    assert sum(outcome.what == "same" for outcome in outcomes) >= 600
    failed = {
        f: outcomes
        for f, outcomes in found.items()
        if any(outcome.what == "failed" for outcome in outcomes.values())
    }
    assert not failed
