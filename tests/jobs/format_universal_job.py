"""Run by the `deepspeed` launcher for test_format_universal.py: trains engines and saves them, or
loads universal checkpoints into others and continues training. Saves the results by case. Cases
without tensor parallelism must come first."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import universal_job as job
from tp_embed import shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang
from tp_embed.integrations.deepspeed.universal_load import load_universal


def make_engine(case: dict[str, Any]) -> Any:
    tp_size = case["tp"]
    tied, typed, stage = case.get("tied", False), case.get("typed", False), case["stage"]
    # Loading changes the weights and the learning rate.
    model = job.build(tied, typed, seed=int("load" in case))
    types = "embed" if stage == 3 else "vocab"
    if tp_size > 1:  # Without it, no groups exist, and later cases can make other ones.
        gang = DeepSpeedGang.from_groups(tp_size=tp_size)
        shard_embeddings(model, gang, rules={"types": types} if typed else None)
    lr = 1e-4 if "load" in case else job.LR
    by_deepspeed = case.get("by_deepspeed", False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True}},
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 100,
            # DeepSpeed shares one step count between sub-groups, counting each step several times;
            # `load_universal()` fixes that.
            "sub_group_size": 1_000_000 if by_deepspeed else 2_000,
        },
        **({"tensor_parallel": {"autotp_size": tp_size}} if tp_size > 1 else {}),
        "checkpoint": {"load_universal": by_deepspeed},
    }
    if case.get("schedule"):
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": job.LR, "warmup_num_steps": 4},
        }
    parameters = job.param_groups(model) if typed else None
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        config=config,
    )
    return engine


def run(name: str, case: dict[str, Any], out: Path) -> dict[str, Any]:
    engine = make_engine(case)
    seen: dict[str, Any] = {}
    batches = job.batches()
    if "load" in case:
        load = (
            engine.load_checkpoint if case.get("by_deepspeed") else partial(load_universal, engine)
        )
        if case.get("fails"):
            return {"error": error(partial(load, str(out / case["load"])))}
        _, client_state = load(str(out / case["load"]))
        seen["client"] = client_state.get("client")
        seen["knows cuts"] = "universal_checkpoint_info" in client_state
    else:
        for ids in batches[:2]:
            job.train(engine, ids)
        engine.save_checkpoint(str(out / name), tag="end", client_state={"client": "kept"})
    seen["steps"] = engine.global_steps
    seen["state"] = {name: job.state(engine, name) for name in job.WATCHED}
    if case.get("typed"):
        seen["buffer"] = int(engine.module.seen)
    seen["losses"] = [job.train(engine, ids) for ids in batches[2:]]
    return seen


def error(call: Any) -> str:
    try:
        call()
    except (AssertionError, OSError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def main(out: Path, plan: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    cases = json.loads(plan.read_text())
    seen = {name: run(name, case, out) for name, case in cases.items()}
    torch.save(seen, plan.with_suffix(f".{dist.get_rank()}.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
