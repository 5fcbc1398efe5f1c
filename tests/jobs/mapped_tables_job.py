"""Run by the `deepspeed` launcher on two ranks for test_mapped_tables_engines.py: engines whose
table is in memory-mapped files. Saves what was seen, by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import row_tables_job as job
from tp_embed.integrations.deepspeed import initialize

CASES = [(0, None, "rowwise_adam"), (1, "bf16", "lazy_adam"), (3, "bf16", "rowwise_adagrad")]


def make(stage: int, half: str | None, kind: str, memory: Path | None, **options: Any) -> Any:
    table: dict[str, Any] = {"optimizer": kind, "weight_decay": job.DECAY}
    if "lr" in options:
        table["lr"] = options.pop("lr")
    if memory is not None:
        table |= {"memory": str(memory), "resident": 1 << 24}
    more: dict[str, Any] = {half: {"enabled": True}} if half else {}
    strategy = options.pop("strategy", "world")
    model = job.build()
    if options.pop("meta", False):
        model.ngram.to_empty(device="meta")
    engine, *_ = initialize(model=model, config=job.config(stage, table, strategy=strategy, **more))
    return engine


def table_of(engine: Any) -> torch.Tensor:
    whole: torch.Tensor = engine.module.ngram.to_embedding().weight.detach().clone()
    return whole


def case(out: Path, stage: int, half: str | None, kind: str) -> dict[str, Any]:
    """Trains in memory and in files, and goes on from a checkpoint, twice."""
    folder, ids = out / f"{stage}_{half}", job.batches(dist.get_rank())
    seen: dict[str, Any] = {}
    engine = make(stage, half, kind, None)
    seen["memory"] = [job.train(engine, ids), job.train(engine, ids), table_of(engine)]
    engine = make(stage, half, kind, folder / "a")
    first = job.train(engine, ids)
    engine.save_checkpoint(str(folder / "saved"), client_state={"mine": 3})
    seen["mapped"] = [first, job.train(engine, ids), table_of(engine)]
    mapped = engine.tp_embed_tables.mapped["ngram"]
    seen["steps"] = [mapped.step]
    mapped.close()
    for name in ("b", "a"):
        again = make(stage, half, kind, folder / name)
        found = again.tp_embed_tables.mapped["ngram"]
        seen["steps"].append(found.step)
        _, client_state = again.load_checkpoint(str(folder / "saved"))
        seen["steps"].append(found.step)
        found.prefetch(again.module.pairs(ids[0, 0]))
        seen[name] = [first, job.train(again, ids), table_of(again)]
        seen["mine"] = client_state["mine"]
    files = sorted((folder / "saved").rglob("*.pt"))
    seen["rows in files"] = [
        len(torch.load(file, weights_only=False)["module"]["ngram.weight"])
        for file in files
        if "model_states" in file.name
    ]
    try:
        again.load_checkpoint(str(folder / "saved"), load_optimizer_states=False)
    except ValueError as e:
        seen["refused"] = str(e)
    return seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen: dict[str, Any] = {f"{each}": case(out, *each) for each in CASES}
    try:
        make(1, None, "lazy_adam", out / "vocab", strategy="vocab")
    except ValueError as e:
        seen["vocab"] = str(e)
    engine = make(1, None, "lazy_adam", out / "meta", meta=True)
    seen["meta"] = [table_of(engine), job.train(engine, job.batches(dist.get_rank()))]
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
