"""Run by the `deepspeed` launcher on two ranks for test_hf_predictions.py: Trainers whose models
have the logits of each rank's classes. Saves what they say by rank."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer

import fuse_loss_job as job
from hf_models import build
from hf_trainer_job import config, dataset, fresh
from tp_embed.integrations.transformers import ShardTables


def best_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the class with the largest logit on any rank."""
    own = logits.as_subclass(torch.Tensor)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts, -1).argmax(-1)


def mean_class(prediction: Any) -> dict[str, float]:
    return {"class": float(prediction.predictions.mean())}


def trainer(directory: Path, options: dict[str, Any], **more: Any) -> Trainer:
    if more.pop("sharded", True):
        fresh()
        more["callbacks"] = [ShardTables()]
        ds_config = config(1, strategy="vocab", shard_logits=True)
        options = options | {"deepspeed": ds_config}
    args = job.arguments(directory, **options)
    data = dataset()
    return Trainer(
        build("llama", vocab_size=38), args, train_dataset=data, eval_dataset=data[:4], **more
    )


def error(function: Any) -> str:
    try:
        function()
    except ValueError as e:
        return str(e)
    return "no error"


def history(found: Trainer, key: str) -> list[float]:
    found.train()
    return [entry[key] for entry in found.state.log_history if key in entry]


def classes(directory: Path, sharded: bool = True) -> list[float]:
    """By a function that knows of the ranks; alone, by the largest logit."""
    alone = lambda logits, labels: logits.argmax(-1)  # noqa: E731
    more = {
        "compute_metrics": mean_class,
        "preprocess_logits_for_metrics": best_classes if sharded else alone,
    }
    return history(trainer(directory, {}, sharded=sharded, **more), "eval_class")


def losses(directory: Path, sharded: bool = True) -> list[float]:
    options = {"prediction_loss_only": True}
    made = trainer(directory, options, sharded=sharded, compute_metrics=job.accuracy)
    return history(made, "eval_loss")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "metrics": error(lambda: trainer(out, {}, compute_metrics=job.accuracy)),
        "classes": classes(out),
        "losses": losses(out),
    }
    for name, process in {"predict": None, "kept": lambda logits, labels: (logits * 2,)}.items():
        made = trainer(out, {}, preprocess_logits_for_metrics=process)
        results["evaluation"] = history(made, "eval_loss")
        results[name] = error(partial(made.predict, dataset()[:4]))
    torch.save(results, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
