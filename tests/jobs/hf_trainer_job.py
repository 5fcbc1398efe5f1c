"""Run by the `deepspeed` launcher on two ranks for test_hf_trainer.py: Trainers of all ZeRO stages,
with tensor parallelism and without. Saves the results by rank."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_models import V, build
from tp_embed import OutputHead, ShardedEmbedding
from tp_embed.integrations.deepspeed import DeepSpeedGang
from tp_embed.integrations.transformers import ShardTables, from_pretrained

STEPS = 4

# AutoTP does not support LoRA: it must skip layers with adapters, here the attention.
MLP_ONLY = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*(gate|up)_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*down_proj\.weight$"], "partition_type": "row"},
    ],
}


LORA = {
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


def build_model(name: str) -> Any:
    """Builds one of :data:`hf_models.MODELS`, optionally with LoRA: ``"llama, LoRA of table"``."""
    name, _, case = name.partition(", LoRA of ")
    model = build(name)
    if case:
        options: Any = LORA[case]
        config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", **options)
        return peft.get_peft_model(model, config)
    return model


def dataset(rows: int = 2 * STEPS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(1, V, (rows, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in data]


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(directory),
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **options},
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        # Makes the best checkpoint differ from the last.
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )


def config(stage: int, tp_size: int = 2, **section: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "tp_embed": section,
    }
    if tp_size > 1:
        found["tensor_parallel"] = {"autotp_size": tp_size}
    return found


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train(model: Any, args: TrainingArguments, **options: Any) -> Any:
    resume = options.pop("resume", None)
    trainer = Trainer(model, args, train_dataset=dataset(), eval_dataset=dataset()[:4], **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def seen(trainer: Any) -> dict[str, Any]:
    return {
        "losses": losses(trainer),
        "eval": losses(trainer, "eval_loss"),
        "best": trainer.evaluate()["eval_loss"],
        "logits": torch.tensor(trainer.predict(dataset()[:2]).predictions),
    }


def full_values(trainer: Any) -> dict[str, Any]:
    """Runs `safe_get_full_*` and `safe_set_full_*` on the table."""
    embed = trainer.model.get_input_embeddings()
    values = safe_get_full_fp32_param(embed.weight)
    table = values.full_tensor()
    safe_set_full_fp32_param(embed.weight, 2 * table)
    found = {"table": table, "doubled": safe_get_full_fp32_param(embed.weight).full_tensor()}
    safe_set_full_fp32_param(embed.weight, table)
    try:
        torch.mv(values, torch.ones(values.shape[1]))
    except ValueError as e:
        found["read"] = str(e)
    if trainer.model_wrapped.zero_optimization_stage() < 3:
        try:
            trainer.model_wrapped.save_16bit_model(trainer.args.output_dir)
        except ValueError as e:
            found["whole"] = str(e)
    return found


def fresh() -> None:
    """Lets Trainers of this process have different DeepSpeed configs."""
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()


def run(directory: Path, stage: int, tp_size: int, model: str, **section: Any) -> dict[str, Any]:
    fresh()
    batch = {"per_device_train_batch_size": tp_size, "per_device_eval_batch_size": tp_size}
    ds_config = config(stage, tp_size, **section)
    if "LoRA" in model:
        ds_config["tensor_parallel"]["partition_config"] = MLP_ONLY
    args = arguments(directory, deepspeed=ds_config, **batch)
    shards = ShardTables()
    trainer = train(build_model(model), args, callbacks=[shards])
    rows = trainer.model.get_output_embeddings().weight.shape[0]
    found = {"report": str(shards.report), "rows": rows, **seen(trainer)}
    trainer.save_model(str(directory / "model"))
    if tp_size > 1 and "LoRA" not in model:
        found["values"] = full_values(trainer)
    fresh()
    args = arguments(directory, deepspeed=ds_config, **batch)
    again = train(
        build_model(model), args, callbacks=[ShardTables()], resume=str(directory / "checkpoint-2")
    )
    found["resumed"] = losses(again)
    return found


def run_loaded(directory: Path) -> list[float]:
    """Trains a model whose tables were never whole."""
    fresh()
    args = arguments(directory / "loaded", deepspeed=config(2))
    gang = DeepSpeedGang.from_groups(tp_size=2)
    kind = type(build("llama"))
    model = from_pretrained(kind, str(directory / "initial"), gang)
    model.train()
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embed, ShardedEmbedding)
    assert isinstance(head, OutputHead)
    shards = ShardTables()
    found = losses(train(model, args, callbacks=[shards]))
    assert str(shards.report) == "no embedding tables"
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    cases: dict[str, Any] = {
        # First, since DeepSpeed keeps the groups of the last engine for engines without groups.
        "ZeRO 1": (1, 1, "llama"),
        "ZeRO 3": (3, 1, "tied llama"),
        "ZeRO 1, TP": (1, 2, "llama"),
        "ZeRO 2, TP": (2, 2, "tied llama"),
        "ZeRO 3, TP": (3, 2, "llama"),
        "LoRA": (1, 2, "llama, LoRA of table"),
        "LoRA, whole table": (2, 2, "llama, LoRA of whole table"),
    }
    for name, case in cases.items():
        try:
            results[name] = run(out / name, *case)
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], flush=True)
    results["loaded"] = run_loaded(out)
    torch.save(results, out / f"seen{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
