"""Run by the `deepspeed` launcher on two ranks for test_mixing.py: tables that AutoTP cuts itself,
and options that mix up shards. Saves the results by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from engines_job import AUTOTP, batches, build, config, step
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize

STEPS, LR = 3, 0.1
SIZES: dict[str, Any] = {
    "vocab_size": 36,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
LONG = {"encoder_attention_type": "transient-global", "local_radius": 3, "global_block_size": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5", {}),
    "mT5": ("MT5", {}),
    "UMT5": ("UMT5", {}),
    "LongT5": ("LongT5", LONG),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "hpZ": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    "qgZ": {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
    "ZenFlow": {"zero_optimization": {"stage": 1, "zenflow": {"topk_ratio": 0.2}}},
    "sequence parallelism": {"sequence_parallel_size": 2, "data_parallel_size": 1},
    "AutoSP": {"compile": {"deepcompile": True, "passes": ["autosp"]}},
    "hybrid engine": {"hybrid_engine": {"enabled": True}},
    "LAMB": {"optimizer": {"type": "Lamb", "params": {"lr": LR}}},
    "Adafactor": {"optimizer": {"type": "Adafactor", "params": {"lr": LR}}},
}
RIGHT: dict[str, dict[str, Any]] = {
    "communication in fp16": {"communication_data_type": "fp16"},
    "predivided": {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    "round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "offload": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    "all-reduce": {
        "zero_optimization": {
            "stage": 3,
            "stage3_use_all_reduce_for_fetch_params": True,
            "stage3_param_persistence_threshold": 0,
        }
    },
    "hpZ of 1": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}},
}


def seq2seq(name: str) -> Any:
    torch.manual_seed(0)
    family, more = MODELS[name]
    made = getattr(transformers, f"{family}Config")(**SIZES, **more)
    return getattr(transformers, f"{family}ForConditionalGeneration")(made)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 36, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def train_alone(name: str) -> list[float]:
    model = seq2seq(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ds_config(stage: int) -> dict[str, Any]:
    sgd = {"type": "SGD", "params": {"lr": LR}}
    return config(stage, tensor_parallel={"autotp_size": 2}, optimizer=sgd)


def train(name: str, stage: int, section: dict[str, Any] | None) -> tuple[list[float], str]:
    if section is None:
        engine, *_ = deepspeed.initialize(model=seq2seq(name), config=ds_config(stage))
    else:
        whole = {**ds_config(stage), "tp_embed": section}
        engine, *_ = initialize(model=seq2seq(name), config=whole)
    losses = []
    for _ in range(STEPS):
        loss = engine(**batch()).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, str(getattr(engine, "tp_embed_report", ""))


def refusal(model: torch.nn.Module, full_config: dict[str, Any], **options: Any) -> str:
    before = list(model.modules())
    try:
        initialize(model=model, config=full_config, **options)
    except ValueError as e:
        assert list(model.modules()) == before
        return str(e)
    return "no error"


def refusals() -> dict[str, str]:
    seen = {name: refusal(build(), {**config(**AUTOTP), **o}) for name, o in OPTIONS.items()}
    seen["mesh"] = refusal(build(), config(**AUTOTP), mesh_param=(1, 2))
    muon = config(**AUTOTP, optimizer={"type": "Muon", "params": {"lr": LR}})
    seen["Muon"] = refusal(build(), muon)
    seen["made by a function"] = made_by_a_function()
    rule = {"rules": {"*relative_attention_bias": "embed"}}
    seen["rule"] = refusal(seq2seq("T5"), {**ds_config(1), "tp_embed": rule})
    return seen


def made_by_a_function() -> str:
    """Returns the error for an optimizer that only the engine knows."""
    untested = {**config(**AUTOTP), "zero_allow_untested_optimizer": True}
    untested.pop("optimizer", None)
    try:
        initialize(model=build(), config=untested, optimizer=lambda p: torch.optim.Adafactor(p))
    except ValueError as e:
        return str(e)
    return "no error"


def train_right(name: str) -> list[float]:
    engine, *_ = initialize(model=build(), config={**config(**AUTOTP), **RIGHT[name]})
    return [step(engine, ids) for ids in batches(0)]


def fragments(strategy: str, stage: int, out: Path) -> dict[str, Any]:
    """Runs `safe_get_full_*` and `safe_set_full_*` on a table, also after loading a checkpoint,
    when DeepSpeed links its values again."""
    adam = {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}}
    section = {"strategy": strategy}
    engine, *_ = initialize(
        model=build(), config=config(stage, **AUTOTP, optimizer=adam, tp_embed=section)
    )
    weight = engine.module.embed.weight
    table = torch.arange(1.0, 185.0).view(23, 8)
    engine.backward(engine(batches(0)[0]))
    seen: dict[str, Any] = {"gradient": safe_get_full_grad(weight).full_tensor()}
    engine.step()
    for name in ("exp_avg", "exp_avg_sq"):
        safe_set_full_optimizer_state(weight, table, name)
        seen[name] = safe_get_full_optimizer_state(weight, name).full_tensor()
    engine.save_checkpoint(str(out / f"{strategy}{stage}"))
    engine.load_checkpoint(str(out / f"{strategy}{stage}"))
    safe_set_full_fp32_param(weight, table)
    found = safe_get_full_fp32_param(weight)
    seen["fp32"] = found.full_tensor()
    for name, action in {
        "read": lambda: torch.mv(found, torch.ones(found.shape[1])),
        "shape": lambda: safe_set_full_fp32_param(weight, torch.ones(3, 3)),
    }.items():
        try:
            action()
            seen[name] = "no error"
        except (TypeError, ValueError) as e:
            seen[name] = str(e)
    return seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    DeepSpeedGang.from_groups(tp_size=2)
    seen: dict[str, Any] = {"refusals": refusals()}
    seen["right"] = {name: train_right(name) for name in RIGHT}
    seen["fragments"] = [
        fragments(strategy, stage, out) for stage in (1, 3) for strategy in ("embed", "vocab")
    ]
    for stage in (1, 3):
        for name in MODELS:
            for how in (None, {}, {"strategy": "vocab"}):
                seen[f"{name}, ZeRO {stage}, {how}"] = train(name, stage, how)
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
