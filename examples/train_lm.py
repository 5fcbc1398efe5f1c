"""Trains a language model with sharded embedding tables on a DeepSpeed engine.

    deepspeed --num_gpus 2 --no_local_rank examples/train_lm.py embedding=vocab_sharded init=normal

A Hydra app: the configs are in `configs/`, the primary one is `configs/train.yaml`. Writes to
`runs/NAME`: `config.yaml`, a log of each rank in `logs/`, `metrics.csv`, `monitor.jsonl`,
`loss.png`, DeepSpeed's `checkpoints/`, and at the end `model/`, the whole model in the layout of
transformers, and `report.html`, a page about the run.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from corpus import Corpus, load
from tp_embed import shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang, export, initialize
from tp_embed.integrations.deepspeed.monitor import EngineMonitor
from tp_embed.integrations.hydra import main as hydra_main
from tp_embed.integrations.hydra import register_schemas, shard_options, table_options
from tp_embed.integrations.transformers import fuse_loss, shard_logits
from tp_embed.monitor import write_report
from tp_embed.monitor.charts import line_charts, save

register_schemas()


@hydra_main(config_path="pkg://tp_embed.configs", config_name="train")
def main(config: DictConfig) -> None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    torch.manual_seed(config.seed)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # One process per core.

    gang = DeepSpeedGang.from_groups(tp_size=config.tp_size)
    is_first = dist.get_rank() == 0
    say = tqdm.write if is_first else lambda text: None

    corpus = load_corpus(config.data, say)
    model = AutoModelForCausalLM.from_config(make_model_config(config.model, corpus.vocab_size))
    # An engine averages gradients over data-parallel ranks.
    report = shard_embeddings(model, gang, **shard_options(config), grad_reduction="mean")
    if config.head.shard_logits:
        shard_logits(model)
    if config.head.fuse_loss.value:
        fuse_loss(model, in_evaluation=config.head.fuse_loss.value == "always")
    say(str(report))

    ds_config: Any = OmegaConf.to_container(config.deepspeed, resolve=True)
    # The tables are sharded already.
    ds_config["tp_embed"] = {"strategy": "none", "tables": table_options(config)}
    engine, *_ = initialize(model=model, config=ds_config)
    metrics = Metrics(run_dir / "metrics.csv")
    checkpoints = Checkpoints(run_dir / "checkpoints")
    first_step = 0
    if config.resume:
        first_step = checkpoints.load(engine)
        say(f"resumed after step {first_step}")
    else:
        checkpoints.set_aside()
    if is_first:
        metrics.start(first_step)
    every = max(1, config.steps // 40)
    EngineMonitor(engine, every=every, directory=run_dir, about={"sharding": str(report)})

    train(engine, corpus, config, metrics, checkpoints, first_step)

    shape = config.data.batch_size, config.data.seq_len
    validation = corpus.validation_loss(engine, config.eval_batches, *shape)
    model_dir = run_dir / "model"
    write_model(engine, model_dir)
    if is_first:
        metrics.plot(run_dir / "loss.png")
        result = {
            "first_loss": metrics.rows[0]["loss"],
            "last_loss": metrics.rows[-1]["loss"],
            "validation_loss": validation,
            "table_bytes_per_rank": report.bytes_per_rank,
            "table_bytes_replicated": report.bytes_replicated,
        }
        (run_dir / "result.json").write_text(json.dumps(result, indent=2))
        say(
            f"loss {result['first_loss']:.3f} -> {result['last_loss']:.3f}, validation loss "
            f"{validation:.4f}; the whole model is in {model_dir}, and a page about the run in "
            f"{write_report(run_dir)}"
        )


def load_corpus(data: DictConfig, say: Callable[[str], None]) -> Corpus:
    """The corpus, which the first rank puts into the cache for all."""
    directory = Path(data.cache_dir)
    if dist.get_rank() == 0:
        load(directory, data.vocab_size, data.max_bytes, say)
    dist.barrier()
    return load(directory, data.vocab_size, data.max_bytes)


def train(
    engine: Any,
    corpus: Corpus,
    config: DictConfig,
    metrics: Metrics,
    checkpoints: Checkpoints,
    first_step: int,
) -> None:
    """Trains from ``first_step`` to the last one, and saves checkpoints."""
    data_rank = dist.get_rank() // config.tp_size
    data_size = dist.get_world_size() // config.tp_size
    shape = config.data.batch_size, config.data.seq_len
    tokens = math.prod(shape) * data_size
    is_first = dist.get_rank() == 0
    progress = tqdm(
        range(first_step, config.steps),
        initial=first_step,
        total=config.steps,
        disable=not is_first,
        unit="step",
    )
    engine.train()
    for step in progress:
        started = time.perf_counter()
        ids = corpus.batch(step, *shape, seed=config.seed, rank=data_rank).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        value = loss.item()
        rate = tokens / (time.perf_counter() - started)
        if is_first:
            metrics.add(step=step + 1, loss=value, tokens_per_second=rate)
            progress.set_postfix(loss=f"{value:.3f}", tokens_s=f"{rate:.0f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoints.save(engine, step + 1)


def make_model_config(model: DictConfig, tokens: int) -> Any:
    """Returns the config of transformers for the choice of the group `model`."""
    fields: Any = OmegaConf.to_container(model, resolve=True)
    given = {key: value for key, value in fields.items() if value is not None}
    extra, model_type = given.pop("extra"), given.pop("type")
    classes = given.setdefault("vocab_size", tokens)
    if classes < tokens:
        raise ValueError(
            f"`model.vocab_size` must be {tokens} or more, the tokens of the data, but is "
            f"{classes} instead. Take a smaller `data.vocab_size`, or null for the tokens' number."
        )
    return AutoConfig.for_model(model_type, use_cache=False, **given, **extra)


def write_model(engine: Any, target: Path) -> None:
    """Writes the whole model in the layout of transformers, replacing ``target``."""
    temporary = target.with_name(f".{target.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # From an interrupted run.
    dist.barrier()
    export(engine, temporary)
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    dist.barrier()


class Checkpoints:
    """DeepSpeed checkpoints that survive an interrupted run: each has its own directory, and
    ``latest`` names one only after all ranks have written it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._latest = directory / "latest"

    def save(self, engine: Any, step: int) -> None:
        previous = self._latest.read_text() if self._latest.exists() else None
        tag = f"step{step}"
        engine.save_checkpoint(
            str(self._directory), tag=tag, client_state={"step": step}, save_latest=False
        )
        dist.barrier()
        if dist.get_rank() == 0:
            temporary = self._directory / ".latest"
            temporary.write_text(tag)
            temporary.replace(self._latest)
            if previous not in (None, tag):
                shutil.rmtree(self._directory / previous)
        dist.barrier()

    def set_aside(self) -> None:
        """Moves the checkpoints of an earlier run with this name to ``checkpoints.previous``,
        replacing it."""
        if dist.get_rank() == 0 and self._directory.exists():
            previous = self._directory.with_name(f"{self._directory.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            self._directory.rename(previous)
        dist.barrier()

    def load(self, engine: Any) -> int:
        """Loads the latest checkpoint and returns its number of steps."""
        # The file names of DeepSpeed and `tp-embed convert --to universal`.
        name = "latest_universal" if engine.load_universal_checkpoint() else "latest"
        if not (self._directory / name).exists():
            raise FileNotFoundError(
                f"`resume=true` needs a checkpoint in '{self._directory}', but there is none: "
                f"no file `{name}`. "
                "Train without it first, or give the run that has one by `name`."
            )
        _, client_state = engine.load_checkpoint(str(self._directory))
        step: int = client_state["step"]
        return step


class Metrics:
    """Figures by step, in a CSV file; a resumed run replaces the steps it repeats."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, float]] = []

    def start(self, first_step: int) -> None:
        if first_step and self._path.exists():
            with self._path.open() as file:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["step"] <= first_step]
        self._path.write_text("step,loss,tokens_per_second\n")
        for row in self.rows:
            self._write(row)

    def add(self, **row: float) -> None:
        self.rows.append(row)
        self._write(row)

    def _write(self, row: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(f"{row['step']:.0f},{row['loss']!r},{row['tokens_per_second']:.1f}\n")

    def plot(self, path: Path) -> None:
        steps, losses = ([row[key] for row in self.rows] for key in ("step", "loss"))
        save(line_charts({"Training loss": [("loss", steps, losses)]}), path)


if __name__ == "__main__":
    main()
