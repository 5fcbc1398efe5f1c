"""Run by the `deepspeed` launcher for test_universal.py: trains engines and saves them, or loads
universal checkpoints into them, and continues training. Saves the results by case and rank."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import llama
from llama import VOCAB
from tp_embed import GangError, shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang
from tp_embed.integrations.deepspeed.export import export
from tp_embed.integrations.deepspeed.universal_load import load_universal

LR = 1e-2

TABLE, NORM = "model.embed_tokens.weight", "model.norm.weight"
# Our table, layers that AutoTP cuts over columns and rows, and a whole one.
WATCHED = (
    TABLE,
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    NORM,
)


class TypedLlama(LlamaForCausalLM):
    """Has a table of one row, which gives one rank an empty shard, and a buffer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.types = nn.Embedding(1, config.hidden_size)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids: Any, labels: Any) -> Any:
        self.seen += input_ids.numel()
        types = self.types(torch.zeros_like(input_ids))
        embeds = self.model.embed_tokens(input_ids) + types
        return super().forward(inputs_embeds=embeds, labels=labels)


def build(tied: bool, typed: bool = False, vocab: int = VOCAB, seed: int = 0) -> LlamaForCausalLM:
    kind = TypedLlama if typed else LlamaForCausalLM
    model: LlamaForCausalLM = llama.build(tied, vocab=vocab, layers=1, seed=seed, kind=kind)
    if typed:
        model.get_parameter(NORM).requires_grad_(False)
        with torch.no_grad():
            model.get_parameter(NORM).uniform_()
    return model


def optimizer_names(model: nn.Module) -> list[str]:
    return [
        name
        for group in param_groups(model)
        for name, p in model.named_parameters()
        if any(p is other for other in group["params"])
    ]


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if "norm" in name], "weight_decay": 0.0},
        {"params": [p for name, p in trained if "norm" not in name], "weight_decay": 0.1},
    ]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (2, 16), generator=generator) for _ in range(5)]


def make_engine(case: dict[str, Any], tp_size: int) -> Any:
    typed = case.get("typed", False)
    model = build(
        case["tied"], typed, case.get("vocab", VOCAB), seed="load" in case or "own" in case
    )
    gang = DeepSpeedGang.from_groups(tp_size=tp_size)
    # An engine at ZeRO 3 cannot run a layer with an empty shard.
    types = "embed" if case["stage"] == 3 else "vocab"
    shard_embeddings(model, gang, rules={"types": types} if typed else None)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {
            "stage": case["stage"],
            "stage3_param_persistence_threshold": 100,
            "sub_group_size": 2_000,
            "round_robin_gradients": case.get("round_robin", False),
        },
        "bf16": {"enabled": case.get("bf16", False)},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 4}},
    }
    # To DeepSpeed its own groups are an `mpu` like any other.
    mpu = groups if case.get("mpu") else None
    if mpu is None:
        config["tensor_parallel"] = {"autotp_size": tp_size}
    parameters = param_groups(model) if typed else None
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=config, mpu=mpu
    )
    return engine


def train(engine: Any, ids: torch.Tensor) -> float:
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def state(engine: Any, name: str) -> dict[str, torch.Tensor]:
    """Returns this rank's shard in fp32, and its moments."""
    param = engine.module.get_parameter(name)
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        # DeepSpeed links the moments after the step of the first param group, before the other
        # groups have moments.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    if stage == 0:
        moments = engine.optimizer.state.get(param, {})
        tensors = {"fp32": param, **{k: moments[k] for k in ("exp_avg", "exp_avg_sq") if moments}}
    elif not param.requires_grad:
        with deepspeed.zero.GatheredParameters([param]):
            tensors = {"fp32": param.detach().clone()}
    else:
        tensors = {"fp32": safe_get_full_fp32_param(param)}
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[key] = safe_get_full_optimizer_state(param, key)
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def run(name: str, case: dict[str, Any], tp_size: int, out: Path) -> dict[str, Any]:
    engine = make_engine(case, tp_size)
    seen: dict[str, Any] = {}
    if "load" in case:
        source, strict = out / case["load"], case.get("strict", True)
        if not strict:
            seen["error"] = error(partial(load_universal, engine, source))
        path, client_state = load_universal(engine, source, strict=strict)
        seen["path"], seen["client"] = path, client_state.get("client")
    elif "own" in case:
        engine.load_checkpoint(str(out / case["own"]), tag="end")
    else:
        for ids in batches()[:2]:
            train(engine, ids)
        engine.save_checkpoint(str(out / name), tag="end", client_state={"client": "kept"})
    seen["steps"] = engine.global_steps
    seen["state"] = {name: state(engine, name) for name in WATCHED}
    if case.get("typed"):
        seen["buffer"] = int(engine.module.seen)
        seen["decay"] = [group["weight_decay"] for group in engine.optimizer.param_groups]
    if case.get("export"):
        export(engine, out / f"{name} model", max_shard_size=30_000)
        export(engine, out / f"{name} model fp32", dtype=torch.float32)
    if "errors" in case:
        calls = {name: partial(load_universal, engine, out / name) for name in case["errors"]}
        calls["tag"] = partial(load_universal, engine, out / "z1", "end")
        calls["export"] = partial(export, engine, out)
        calls["dtype"] = partial(export, engine, out / "new", dtype=torch.float64)
        if case["stage"] == 0 or case.get("round_robin"):
            calls["full precision"] = partial(export, engine, out / "new", dtype=torch.float32)
        seen["errors"] = {key: error(call) for key, call in calls.items()}
    seen["losses"] = [train(engine, ids) for ids in batches()[2:]]
    return seen


def error(call: Any) -> str:
    try:
        call()
    except (GangError, OSError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def main(tp_size: int, out: Path, plan: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen = {
        name: run(name, case, tp_size, out) for name, case in json.loads(plan.read_text()).items()
    }
    torch.save(seen, plan.with_suffix(f".{dist.get_rank()}.pt"))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
