"""Run by the `deepspeed` launcher: trains small models and saves them with DeepSpeed, or loads such
checkpoints and continues training. Saves the results by case and rank.

    deepspeed convert_job.py OUT CASES

CASES is a JSON file that maps names of cases to `stage` (of ZeRO), and optionally `dtype`
(`float32`, `bfloat16` or `float16`), `tp` (the number of tensor-parallel ranks), `mpu` (takes them
from an `mpu` instead of AutoTP), `tied`, `typed` (with a table of one row, a buffer, a frozen
Parameter and two param groups), `layers`, `steps` (2), `config` (more of the DeepSpeed config),
`zero` (more of its `zero_optimization`),
`save` (arguments of `save_checkpoint()`), `load` (the directory of a DeepSpeed checkpoint to train
on for `steps`) or `universal` (the same with a universal checkpoint, loaded by DeepSpeed).

The checkpoint of a case is OUT/NAME/end. Cases without tensor parallelism must come first. Each
rank writes OUT/CASES.RANK.pt: for each case the `losses`, the `state` of all Parameters at the time
of saving, the `steps` and the `buffers`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups

import llama
from tp_embed.integrations.deepspeed import initialize
from universal_job import LR, NORM, TypedLlama, batches, param_groups, state, train

# The weights move from the first step on.
WARMUP = {"warmup_min_lr": LR / 2, "warmup_max_lr": LR, "warmup_num_steps": 4}


def build(case: dict[str, Any], seed: int = 0) -> Any:
    kind = TypedLlama if case.get("typed") else llama.LlamaForCausalLM
    model = llama.build(case.get("tied", False), layers=case.get("layers", 1), seed=seed, kind=kind)
    if case.get("typed"):
        model.get_parameter(NORM).requires_grad_(False)
        with torch.no_grad():
            model.get_parameter(NORM).uniform_()
    return model


def make_engine(case: dict[str, Any]) -> Any:
    tp_size = case.get("tp", 1)
    dtype = case.get("dtype", "float32")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {
            "stage": case["stage"],
            "stage3_param_persistence_threshold": 100,
            "sub_group_size": 2_000,
            **case.get("zero", {}),
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16", "initial_scale_power": 8},
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
    }
    # An engine at ZeRO 3 cannot run a layer with an empty shard.
    types = "embed" if case["stage"] == 3 else "vocab"
    if case.get("typed"):
        config["tp_embed"] = {"rules": {"types": types}}
    mpu = None
    if case.get("mpu"):
        # To DeepSpeed its own groups are an `mpu` like any other.
        groups._init_tp_mesh_device(tp_size)
        mpu = groups
    elif tp_size > 1:
        config["tensor_parallel"] = {"autotp_size": tp_size}
    config.update(case.get("config", {}))
    is_loaded = "load" in case or "universal" in case
    model = build(case, seed=int(is_loaded))
    parameters = param_groups(model) if case.get("typed") else None
    engine, *_ = initialize(model=model, model_parameters=parameters, config=config, mpu=mpu)
    return engine


def run(name: str, case: dict[str, Any], out: Path) -> dict[str, Any]:
    engine = make_engine(case)
    data = batches()
    seen: dict[str, Any] = {}
    for key, is_universal in (("load", False), ("universal", True)):
        if key in case:
            engine._config.load_universal_checkpoint = is_universal
            directory = Path(case[key])
            _, seen["client"] = engine.load_checkpoint(str(directory.parent), tag=directory.name)
            seen["loaded"] = states(engine, case)
            data = data[2:]
    seen["losses"] = [train(engine, ids) for ids in data[: case.get("steps", 2)]]
    seen["state"] = states(engine, case)
    seen["steps"] = engine.global_steps
    seen["buffers"] = {key: value.clone() for key, value in engine.module.named_buffers()}
    client = {"client": "kept", "epoch": 3}
    save = case.get("save", {})
    engine.save_checkpoint(str(out / name), tag="end", client_state=client, **save)
    return seen


def states(engine: Any, case: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns this rank's shard of each Parameter, gathered over ZeRO, and its moments."""
    parameters = dict(engine.module.named_parameters())
    is_wrapped = case["stage"] == 0 and case.get("dtype", "float32") != "float32"
    # DeepSpeed itself returns wrong moments for such an engine.
    is_wrapped |= case.get("zero", {}).get("round_robin_gradients", False)
    if is_wrapped or not engine.global_steps:
        return {name: weight(p) for name, p in parameters.items() if has_values(p)}
    return {name: state(engine, name) for name, p in parameters.items() if has_values(p)}


def weight(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters([parameter]):
        return {"weight": parameter.detach().clone()}


def has_values(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "ds_numel", parameter.numel()) > 0


def main(out: Path, cases: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen = {name: run(name, case, out) for name, case in json.loads(cases.read_text()).items()}
    torch.save(seen, out / f"{cases.stem}.{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
