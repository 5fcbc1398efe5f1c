"""Run by the `deepspeed` launcher on two ranks for test_hf_fuse_loss_engines.py: Trainers and loops
of Accelerate whose models compute their loss from hidden states. Saves the results by rank."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from hf_models import build
from hf_trainer_job import config, dataset, fresh, losses
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from tp_embed.integrations.transformers import ShardTables, from_pretrained, prepare
from tp_embed.nn.deferred import DeferredLogits

STEPS = 3
# By name: a ZeRO stage and a model of `hf_models`.
TRAINERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "ZeRO 0": (0, "llama", {}),
    "ZeRO 1": (1, "gemma3", {}),
    "ZeRO 2": (2, "tied llama", {}),
    "ZeRO 3": (3, "llama", {}),
    "ZeRO 3, tied": (3, "tied llama", {}),
    "label smoothing": (1, "llama", {"label_smoothing_factor": 0.2}),
    "accumulation": (2, "llama", {"gradient_accumulation_steps": 2}),
    "loss only": (1, "llama", {"prediction_loss_only": True}),
}


class Recording(Trainer):  # type: ignore[misc]
    """Notes the types of the logits of training and of evaluation."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kinds: set[str] = set()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, **(options | {"return_outputs": True}))
        kind = type(outputs["logits"]).__name__
        self.kinds.add(f"{'training' if model.training else 'evaluation'}: {kind}")
        return (loss, outputs) if options.get("return_outputs") else loss


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(directory),
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **options},
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = map(torch.tensor, (prediction.predictions, prediction.label_ids))
    return {"accuracy": float((logits.argmax(-1) == labels).float().mean())}


def masked_dataset() -> list[dict[str, Tensor]]:
    """Rows with different numbers of labels, so that the Trainer's count of them matters."""
    rows = dataset(12)
    for i, row in enumerate(rows):
        labels = row["labels"].clone()
        labels[: i % 5] = -100
        row["labels"] = labels
    return rows


def train(name: str, directory: Path, ds_config: Any = None, **options: Any) -> dict[str, Any]:
    """With ``ds_config``, on two ranks."""
    _, model, more = TRAINERS[name]
    args = arguments(directory, deepspeed=ds_config, **more)
    metrics = None if args.prediction_loss_only else accuracy
    data = masked_dataset()
    trainer = Recording(
        build(model),
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        compute_metrics=metrics,
        **options,
    )
    trainer.train()
    return {
        "losses": losses(trainer),
        "norms": losses(trainer, "grad_norm"),
        "eval": losses(trainer, "eval_loss"),
        "accuracy": losses(trainer, "eval_accuracy"),
        "kinds": sorted(trainer.kinds),
    }


def steps(step: Any) -> list[float]:
    return [step(row["input_ids"][None], row["labels"][None]) for row in masked_dataset()[:STEPS]]


def loop_config(stage: int, **section: Any) -> dict[str, Any]:
    return config(stage, **section) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_allow_untested_optimizer": True,
    }


def accelerate(stage: int, model: Any, **section: Any) -> list[float]:
    fresh()
    options = section.pop("options", {})
    ds_config = loop_config(stage, **section)
    ds_config.pop("optimizer")
    PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, optimizer = prepare(accelerator, model.train(), optimizer, **options)

    def step(ids: Tensor, labels: Tensor) -> float:
        output = engine(input_ids=ids, labels=labels)
        assert isinstance(output.logits, DeferredLogits)
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss)

    return steps(step)


def by_initialize(stage: int, model: Any, fuse: Any) -> list[float]:
    engine, *_ = initialize(model=model.train(), config=loop_config(stage, fuse_loss=fuse))

    def step(ids: Tensor, labels: Tensor) -> float:
        output = engine(input_ids=ids, labels=labels)
        assert isinstance(output.logits, DeferredLogits)
        engine.backward(output.loss)
        engine.step()
        return float(output.loss)

    found = steps(step)
    if fuse == "always":
        with torch.no_grad():
            ids = dataset()[0]["input_ids"][None]
            engine.eval()
            assert isinstance(engine(input_ids=ids, labels=ids).logits, DeferredLogits)
            assert isinstance(engine(input_ids=ids).logits, Tensor)
    return found


def alone(name: str) -> list[float]:
    """The same by plain torch in one process."""
    model = build(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(ids: Tensor, labels: Tensor) -> float:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return steps(step)


def trainer(directory: Path, shards: ShardTables, **section: Any) -> Trainer:
    fresh()
    args = arguments(directory, deepspeed=config(1, **section))
    data = dataset()
    return Trainer(
        build("llama"),
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        compute_metrics=accuracy,
        callbacks=[shards],
    )


def smooth() -> None:
    fresh()
    engine, *_ = initialize(model=build("llama").train(), config=loop_config(1, fuse_loss=True))
    ids = dataset()[0]["input_ids"][None]
    LabelSmoother(0.1)(engine(input_ids=ids, labels=ids), ids, shift_labels=True)


def refusals(directory: Path) -> dict[str, str]:
    """Returns the errors of what needs logits, or a head, that is not there."""
    ways = {
        "metrics": lambda: trainer(directory, ShardTables(fuse_loss="always")).train(),
        "smoothing": smooth,
        "whole head": lambda: trainer(
            directory, ShardTables(), fuse_loss=True, shard_head=False
        ).train(),
        "both": lambda: trainer(directory, ShardTables(fuse_loss=True), shard_logits=True),
        "value": lambda: trainer(directory, ShardTables(), fuse_loss="sometimes"),
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}

    def note(name: str, function: Any, *args: Any, **options: Any) -> None:
        fresh()
        try:
            results[name] = function(*args, **options)
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], flush=True)

    for name, (stage, _, _) in TRAINERS.items():
        options: dict[str, Any] = {} if name == "ZeRO 3, tied" else {"strategy": "vocab"}
        ds_config = config(stage, fuse_loss=True, **options)
        note(name, train, name, out / name, ds_config, callbacks=[ShardTables()])
    note("Accelerate, ZeRO 1", accelerate, 1, build("llama"), options={"fuse_loss": True})
    note("Accelerate, ZeRO 3", accelerate, 3, build("tied llama"), fuse_loss=True)
    for stage in range(4):
        note(f"initialize, ZeRO {stage}", by_initialize, stage, build("qwen3"), "always")
    fresh()
    gang = DeepSpeedGang.from_groups(tp_size=2)
    loaded = from_pretrained(type(build("llama")), str(out / "initial"), gang, fuse_loss=True)
    note("from_pretrained", by_initialize, 2, loaded, False)
    results["refusals"] = refusals(out)
    torch.save(results, out / f"seen{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
