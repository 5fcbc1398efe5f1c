"""Run on two ranks for test_trl_trainers.py: trainers of TRL with sharded tables. Saves the results
by rank."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from hf_models import V, build
from hf_trainer_job import config, fresh
from tp_embed.integrations.transformers import ShardTables

STEPS = 3
NAMES = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, V))]


def tokenizer() -> Any:
    words = {name: i for i, name in enumerate(NAMES)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def texts(rows: int, length: int, seed: int) -> list[str]:
    drawn = torch.randint(
        4, V, (rows, length), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return [" ".join(NAMES[i] for i in row) for row in drawn]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs between completions, so that advantages are not zero."""
    return [sum(i % 7 for i in ids) / len(ids) for ids in completion_ids]


def options(directory: Path, ds_config: Any, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "deepspeed": ds_config,
        **more,
    }


def save_model(directory: Path) -> None:
    """Saves the model of policies, from which TRL also loads the reference."""
    build("llama").save_pretrained(directory / "model")


def load_model(directory: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(directory / "model")


def policy(
    trainer: Any, config_class: Any, directory: Path, ds_config: Any, callbacks: Any, **more: Any
) -> Any:
    model = load_model(directory)  # Before there is a config with ZeRO 3.
    more = {"num_generations": 2, "max_completion_length": 6, **more}
    return trainer(
        model,
        reward_funcs=reward,
        args=config_class(**options(directory, ds_config, **more)),
        train_dataset=Dataset.from_dict({"prompt": texts(16, 5, seed=2)}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


grpo = partial(policy, GRPOTrainer, GRPOConfig)
rloo = partial(policy, RLOOTrainer, RLOOConfig)


def kto(directory: Path, ds_config: Any, callbacks: Any, **more: Any) -> Any:
    rows = {
        "prompt": texts(16, 5, seed=2),
        "completion": texts(16, 5, seed=3),
        "label": [True, False, False, True] * 4,
    }
    return KTOTrainer(
        load_model(directory),
        args=KTOConfig(**options(directory, ds_config, max_length=32, **more)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def rewards(directory: Path, ds_config: Any, callbacks: Any, **more: Any) -> Any:
    config = build("llama").config
    config.num_labels = 1
    torch.manual_seed(0)
    rows = {"chosen": texts(16, 9, seed=2), "rejected": texts(16, 7, seed=3)}
    return RewardTrainer(
        LlamaForSequenceClassification(config),
        args=RewardConfig(**options(directory, ds_config, max_length=32, **more)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def dpo(directory: Path, ds_config: Any, callbacks: Any, **more: Any) -> Any:
    rows = {
        "prompt": texts(16, 5, seed=2),
        "chosen": texts(16, 5, seed=3),
        "rejected": texts(16, 4, seed=4),
    }
    return DPOTrainer(
        load_model(directory),
        args=DPOConfig(**options(directory, ds_config, max_length=32, **more)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


Make = Callable[..., Any]
# By name: the trainer, the ZeRO stage, and its options.
CASES: dict[str, tuple[Make, int, dict[str, Any]]] = {
    "reward": (rewards, 1, {}),
    "KTO": (kto, 1, {}),
    "DPO": (dpo, 2, {}),
    "GRPO": (grpo, 1, {}),
    "GRPO, reference": (grpo, 2, {"beta": 0.1, "gradient_accumulation_steps": 2}),
    "GRPO, iterations": (grpo, 3, {"num_iterations": 2, "loss_type": "grpo"}),
    "RLOO": (rloo, 1, {}),
}

# What is refused: the trainer, its options, and what the section `tensor_parallel` lacks.
REFUSED: dict[str, tuple[Make, dict[str, Any], bool]] = {
    "groups": (grpo, {"num_generations": 8}, True),
    "batch": (grpo, {"scale_rewards": "batch"}, True),
    "aggregation": (grpo, {"multi_objective_aggregation": "normalize_then_sum"}, True),
    "advantages": (rloo, {"normalize_advantages": True}, True),
    "entropy": (grpo, {"top_entropy_quantile": 0.5}, True),
    "KTO, cut head": (kto, {}, False),
    "RLOO, cut head": (rloo, {}, False),
}

LOGGED = ("loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length")


def train(name: str, directory: Path, ds_config: Any = None, **more: Any) -> dict[str, list[float]]:
    """With ``ds_config``, on two ranks."""
    make, _, chosen = CASES[name]
    callbacks = [] if ds_config is None else [ShardTables()]
    trainer = make(directory, ds_config, callbacks, **chosen, **more)
    trainer.train()
    history = trainer.state.log_history
    return {key: [entry[key] for entry in history if key in entry] for key in LOGGED}


def engine_config(stage: int, has_preset: bool = True) -> dict[str, Any]:
    """Without a preset, AutoTP cuts whole heads, such as the one of a reference model."""
    found = config(stage, strategy="vocab")
    if has_preset:
        found["tensor_parallel"]["preset_model"] = "llama"
    return found


def refusal(name: str, directory: Path) -> str:
    make, chosen, has_preset = REFUSED[name]
    try:
        make(directory, engine_config(1, has_preset), [ShardTables()], **chosen)
    except ValueError as e:
        return str(e)
    return "not refused"


def main(out: Path, *names: str) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in names or CASES:
        fresh()
        try:
            results[name] = train(name, out, engine_config(CASES[name][1]))
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], flush=True)
    for name in () if names else REFUSED:
        fresh()
        results[name] = refusal(name, out)
    torch.save(results, out / f"seen{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
