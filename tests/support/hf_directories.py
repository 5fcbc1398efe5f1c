"""Directories of Hugging Face transformers, for the tests of the format."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import llama
from tp_embed.checkpoint import Request, convert

INDEX = "model.safetensors.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def to_hf(source, output, **options):
    return convert(source, output, Request("hf", source_format="hf", **options))


def pt_to_hf(source, output, **options):
    return convert(source, output, Request("hf", source_format="pt", **options))


def save(path, tied=False, *, max_shard_size="20KB", dtype=torch.float32, **config):
    """Saves a Llama with transformers."""
    model = llama.build(tied).to(dtype).eval()
    model.config.update(config)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(llama.VOCAB)[None]).logits


def from_pretrained(path, **options):
    model, info = LlamaForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def state_dict(path):
    """Loads all tensors of a directory with safetensors."""
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def without_output(path):
    """Returns whether nothing was left at or next to `path`."""
    return not path.exists() and not list(path.parent.glob(f".{path.name}*"))
