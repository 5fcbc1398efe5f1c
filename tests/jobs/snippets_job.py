"""Run by the `deepspeed` launcher on two ranks for test_snippets.py: runs the Python of the docs
with the names that the text takes for granted, and saves the error of each block, or None."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import tp_embed
import tp_embed.checkpoint
import tp_embed.integrations.deepspeed
import tp_embed.integrations.transformers
import tp_embed.monitor
from llama import VOCAB, build
from snippets import Block, blocks_of, python_blocks
from tp_embed.checkpoint import Rule
from tp_embed.integrations.deepspeed.monitor import EngineMonitor
from tp_embed.integrations.hydra import register_schemas

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {"autotp_size": 2},
}
# To be loaded into an engine with as many rows as the block gives the table.
ROWS_OF_THE_ENGINE = {"resize_vocab(": 32064}


def on_rank_0(function: Callable[..., Any]) -> Callable[..., Any]:
    """What one process does, while the others wait for it."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 0:
            function(*args, **kwargs)
        dist.barrier()

    return call


def public_names() -> dict[str, Any]:
    packages = (
        tp_embed,
        tp_embed.checkpoint,
        tp_embed.integrations.deepspeed,
        tp_embed.integrations.transformers,
        tp_embed.monitor,
    )
    found = {name: getattr(package, name) for package in packages for name in package.__all__}
    alone = ("resize_vocab", "to_universal", "write_report")
    return found | {name: on_rank_0(found[name]) for name in alone}


def build_engine(rows: int) -> Any:
    engine, *_ = tp_embed.integrations.deepspeed.initialize(
        model=build(False, vocab=rows), config=CONFIG
    )
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return engine


def names_for(block: Block) -> dict[str, Any]:
    """What the text around the block says is there."""
    gang = tp_embed.integrations.deepspeed.DeepSpeedGang.from_groups(tp_size=2)
    model = build(False)
    if not re.search(r"shard_embeddings\(|from_pretrained\(", block.text):
        tp_embed.shard_embeddings(model, gang)
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    names = public_names() | {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "EngineMonitor": EngineMonitor,
        "Path": Path,
        "TrainerCallback": TrainerCallback,
        "batches": [(ids, ids)] * 2,
        "build_model": lambda: build(False),
        "config": CONFIG,
        "deepspeed": deepspeed,
        "device": "cpu",
        "directory": "model",
        "dist": dist,
        "gang": gang,
        "group": None,
        "ids": ids,
        "load_file": load_file,
        "loss_fn": lambda output, targets: cross_entropy(output.logits.mT, targets),
        "model": model,
        "optimizer": optimizer,
        "path": "dcp",
        "rank": dist.get_rank(),
        "step": lambda: model(ids),
        "ties": {},
        "tokenizer": range(VOCAB + 3),
        "torch": torch,
        "tp_size": 2,
        "train": lambda: model(ids),
    }
    if "config.tp_embed" in block.text:
        app = next(b for b in blocks_of(block.page) if b.language == "yaml")
        Path(f"app{dist.get_rank()}.yaml").write_text(app.text)
        with initialize_config_dir(os.getcwd(), version_base=None):
            names["config"] = compose(f"app{dist.get_rank()}")
    if "zero.Init(" in block.text:
        names["config"] = CONFIG | {"zero_optimization": {"stage": 3}}
    if "trainer" in block.text:
        names["trainer"] = Trainer(build(False), TrainingArguments("trainer", use_cpu=True))
    if "engine" in block.text and "initialize(" not in block.text:
        rows = [rows for call, rows in ROWS_OF_THE_ENGINE.items() if call in block.text]
        names["engine"] = build_engine(rows[0] if rows else VOCAB)
    return names


def make_files() -> None:
    """What pages read: a model of transformers, an engine's checkpoint, one of our own format."""
    build_engine(VOCAB).save_checkpoint("run", tag="step100")
    if dist.get_rank() == 0:
        build(False).save_pretrained("model")
        rules = ("*embed_tokens.weight=1", "lm_head.weight=0", "*=replicated")
        options = tp_embed.checkpoint.ReadOptions(rules=tuple(map(Rule.parse, rules)))
        request = tp_embed.checkpoint.Request("tp-embed", tp_size=2, read=options)
        tp_embed.checkpoint.convert("model", "checkpoint", request)
    dist.barrier()


def enter_directory(directory: Path, files: Path | None = None) -> None:
    """A directory for each block, since blocks may write what others do."""
    if dist.get_rank() == 0:
        shutil.copytree(files, directory) if files else directory.mkdir()
    dist.barrier()
    os.chdir(directory)


def main(output: Path) -> None:
    deepspeed.init_distributed()
    register_schemas()
    files = output / "files"
    enter_directory(files)
    make_files()
    errors: dict[str, str | None] = {}
    for block in python_blocks():
        print(block.name, flush=True)  # For a job that hangs.
        enter_directory(output / f"{block.page.stem}-{block.line}", files)
        torch.manual_seed(0)
        try:
            exec(compile(block.text, block.name, "exec"), names_for(block))
            errors[block.name] = None
        except Exception:
            errors[block.name] = traceback.format_exc()
            print(errors[block.name], flush=True)  # The other rank may wait for this one.
        dist.barrier()
    (output / f"errors-{dist.get_rank()}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
