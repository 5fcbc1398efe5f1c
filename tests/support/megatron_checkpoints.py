"""Checkpoints in the layout of Megatron-LM, written and read with plain torch."""

from __future__ import annotations

import pathlib
import signal
import types
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tp_embed.checkpoint import Plan, Request, convert, formats
from tp_embed.checkpoint.contents import Checkpoint, Key, ReadOptions
from tp_embed.checkpoint.cuts import Rule

VOCAB, HIDDEN, FFN, LAYERS = 301, 24, 48, 4
TABLE = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.{}.self_attention.linear_proj.weight"
FC1 = "decoder.layers.{}.mlp.linear_fc1.weight"
FC2 = "decoder.layers.{}.mlp.linear_fc2.weight"
NORM = "decoder.layers.{}.input_layernorm.weight"
LAST_NORM = "decoder.final_layernorm.weight"
# Queries, keys and values as three equal blocks; a gated MLP as two.
RULES = tuple(
    map(
        Rule.parse,
        [
            "*.linear_qkv.weight=0/3",
            "*.linear_proj.weight=1",
            "*.linear_fc1.weight=0/2",
            "*.linear_fc2.weight=1",
            "*norm.weight=replicated",
        ],
    )
)
READ = ReadOptions(rules=RULES)


def whole_model() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = {TABLE: torch.randn(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        model[NORM.format(layer)] = torch.randn(HIDDEN)
        model[QKV.format(layer)] = torch.randn(3 * HIDDEN, HIDDEN)
        model[PROJ.format(layer)] = torch.randn(HIDDEN, HIDDEN)
        model[FC1.format(layer)] = torch.randn(2 * FFN, HIDDEN)
        model[FC2.format(layer)] = torch.randn(HIDDEN, FFN)
    model[LAST_NORM] = torch.randn(HIDDEN)
    model[HEAD] = torch.randn(VOCAB, HIDDEN)
    return model


def shard(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """Returns Megatron's shard of a Parameter on a rank."""
    if name in (TABLE, HEAD):
        padded = -(-len(tensor) // (128 * size)) * 128 * size
        return functional.pad(tensor, (0, 0, 0, padded - len(tensor))).chunk(size)[rank].clone()
    if "linear_qkv" in name or "linear_fc1" in name:
        blocks = tensor.chunk(3 if "qkv" in name else 2)
        return torch.cat([block.chunk(size)[rank] for block in blocks])
    if "linear_proj" in name or "linear_fc2" in name:
        return tensor.chunk(size, dim=1)[rank].clone()
    return tensor.clone()


def save(path: Path, rank: str, model: Mapping[str, Any], **root: Any) -> Path:
    """Writes a rank's file as ``save_checkpoint()`` does."""
    file = path / f"mp_rank_{rank}" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"checkpoint_version": 3.0, "iteration": 100, "model": model, **root}
    torch.save({key: value for key, value in content.items() if value is not None}, file)
    return file


def save_all(path: Path, model: Mapping[str, Tensor], size: int, **root: Any) -> Path:
    for rank in range(size):
        shards = {name: shard(name, tensor, rank, size) for name, tensor in model.items()}
        save(path / "iter_0000100", f"{rank:02d}", shards, **root)
    (path / "latest_checkpointed_iteration.txt").write_text("100")
    return path


def args_of(size: int, **others: Any) -> Namespace:
    return Namespace(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        vocab_size=None,
        make_vocab_size_divisible_by=128,
        padded_vocab_size=-(-VOCAB // (128 * size)) * 128 * size,
        tensor_model_parallel_size=size,
        pipeline_model_parallel_size=1,
        params_dtype=torch.float32,
        exit_signal=signal.SIGTERM,
        save=pathlib.PurePosixPath("checkpoints"),
        rope=types.SimpleNamespace(base=10000),
        **others,
    )


def load(path: Path, rank: int, iteration: str = "iter_0000100") -> dict[str, Any]:
    file = path / iteration / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    root: dict[str, Any] = torch.load(file, weights_only=False)
    return root


def read(path: Path, options: ReadOptions = READ) -> Checkpoint:
    return formats.read(path, options, "megatron")


def move(source: Path, output: Path, size: int, **options: Any) -> Plan:
    options = {"read": READ, **options}
    request = Request(options.pop("to", "megatron"), size, source_format="megatron", **options)
    return convert(source, output, request, verify=True)


def assert_holds(checkpoint: Checkpoint, model: Mapping[str, Tensor]) -> None:
    assert checkpoint.names == list(model)
    for name, tensor in model.items():
        found = checkpoint.tensors[Key(name)].load()
        assert torch.equal(found, tensor), name


def assert_is_layout(path: Path, model: Mapping[str, Tensor], size: int) -> None:
    """Asserts that each rank has Megatron's shards, bit for bit."""
    assert sorted(each.name for each in (path / "iter_0000100").iterdir()) == [
        f"mp_rank_{rank:02d}" for rank in range(size)
    ]
    for rank in range(size):
        held = load(path, rank)["model"]
        assert list(held) == list(model)
        for name, tensor in model.items():
            assert torch.equal(held[name], shard(name, tensor, rank, size)), (name, rank)
