"""Loads, saves and decodes models of transformers with n-gram and per-layer tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ngram_job as job
from tp_embed import shard_embeddings
from tp_embed.integrations.transformers import from_pretrained

# Rank 0 of the job writes, and is in no smaller gang of the pool.
SIZE = 4
NAMES = ["qwen", "gemma3n", "gemma4"]
KINDS = {
    "embed": "ShardedEmbedding",
    "vocab": "VocabShardedEmbedding",
    "cyclic": "RowWiseEmbedding",
}


def files_of(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def answers(model):
    """The logits of a batch, and what is generated after its first tokens."""
    ids = job.batches(0)[0]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        tokens = model.generate(
            ids[:, :7], max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=-1
        )
    return logits, tokens


def load(gang, name, strategy, directory):
    model_class = type(job.build(name))
    sharding = {"strategy": strategy}
    if strategy == "cyclic":
        rules = {job.TABLES[name]: "world"}
        sharding = {"rules": rules, "placement": "cyclic", "world": gang}
    model = from_pretrained(model_class, str(directory / name), gang, sharding=sharding)
    found = answers(model)
    if gang.size == SIZE:
        model.save_pretrained(directory / f"{strategy} {name}", gang.rank == 0)
    return (type(model.get_submodule(job.TABLES[name])).__name__, *found)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf_ngram")
    for name in NAMES:
        model = job.build(name)
        if name == "qwen":
            model.config.split_ngram_parts = 4  # 512 in Qwen's files.
        model.save_pretrained(directory / name)
    return directory


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("size", "strategy"),
    [(2, "vocab"), (3, "vocab"), (3, "cyclic"), (4, "cyclic"), (4, "embed"), (4, "vocab")],
)
def test_loads_generates_and_saves(pool, directory, name, size, strategy):
    model_class: Any = type(job.build(name))
    logits, tokens = answers(model_class.from_pretrained(directory / name))
    kind = KINDS[strategy]
    for found_kind, *found in pool(size, load, name, strategy, directory):
        assert found_kind == kind
        torch.testing.assert_close(found[0], logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], tokens)
    if size == SIZE:
        expected, again = files_of(directory / name), files_of(directory / f"{strategy} {name}")
        assert again.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(again[key], tensor), key


def decode(gang, name):
    """Sharded over all ranks, which generate after prompts of their own."""
    model = job.build(name).eval()
    shard_embeddings(model, gang, rules={job.TABLES[name]: "world"}, strategy="vocab", world=gang)
    return answers(model)


@pytest.mark.parametrize("name", NAMES)
def test_generates_with_a_table_over_all_ranks(pool, name):
    logits, tokens = answers(job.build(name))
    for found in pool(2, decode, name):
        torch.testing.assert_close(found[0], logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], tokens)
