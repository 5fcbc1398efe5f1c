"""Loading and saving shards takes only memory for shards."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import hf_memory_job as job
from launch import run, torchrun_command

TABLE = job.V * job.E * 4 / 2**20  # In MiB.


def build(vocab_size):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=job.E,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("memory")
    build(100).save_pretrained(out / "small")
    build(job.V).save_pretrained(out / "large")
    run(torchrun_command(job.__file__, out))
    return out


@pytest.fixture(scope="module")
def seen(directory):
    return [torch.load(directory / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_no_rank_has_ever_held_the_table(seen, strategy):
    for rank in range(2):
        found = seen[rank][strategy]
        assert TABLE / 2 < found["held"] < TABLE / 2 + 20
        # The shards, and a chunk per reading thread.
        assert found["load"] < found["held"] + 80
        # The rank that writes maps the file with the gathered table.
        assert found["save"] < (0 if rank else TABLE) + 80


def test_saved_table_is_that_which_was_loaded(directory):
    with safe_open(directory / "large" / "model.safetensors", framework="pt") as expected:
        for strategy in ("embed", "vocab"):
            with safe_open(directory / strategy / "model.safetensors", framework="pt") as found:
                assert set(found.keys()) == set(expected.keys())
                for key in found.keys():  # noqa: SIM118 (it is no mapping)
                    assert torch.equal(found.get_tensor(key), expected.get_tensor(key)), key
