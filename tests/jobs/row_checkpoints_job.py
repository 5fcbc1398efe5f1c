"""Run by the `deepspeed` launcher for test_row_checkpoints.py: engines whose table has an optimizer
of its own are saved on two ranks, and loaded on three. Saves what was seen, by rank.

    deepspeed row_checkpoints_job.py OUT save|load
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from engines_job import mpu_over
from row_tables_job import DECAY, batches, config, make, replica_of, train
from tp_embed.checkpoint import hook_state_dict
from tp_embed.integrations.deepspeed import export, load_universal

# ZeRO stage, layout, optimizer, strategy, placement and dtype.
Case = tuple[int, str, str, str, str, str]
SAVED: dict[str, Case] = {
    "all ranks": (0, "dp", "rowwise_adam", "world", "block", "fp32"),
    "copies": (0, "dp", "rowwise_adagrad", "vocab", "block", "fp32"),
    "vocab": (1, "tp", "rowwise_adagrad", "vocab", "block", "bf16"),
    "cyclic": (2, "dp", "rowwise_adam", "world", "cyclic", "bf16"),
    "embed": (3, "tp", "rowwise_adam", "embed", "block", "fp32"),
    "ZeRO 3": (3, "dp", "lazy_adam", "world", "cyclic", "bf16"),
}
# What is loaded, how, and into which engine.
LOADED: dict[str, tuple[str, str, Case]] = {
    # First: DeepSpeed keeps an `mpu` for all later engines.
    "config": ("ZeRO 3", "config", (2, "plain", "lazy_adam", "vocab", "block", "bf16")),
    "all ranks": ("all ranks", "engine", (0, "dp", "rowwise_adam", "world", "cyclic", "fp32")),
    "copies": ("copies", "engine", (0, "dp", "rowwise_adagrad", "world", "block", "fp32")),
    "vocab": ("vocab", "universal", (2, "tp", "rowwise_adagrad", "embed", "block", "bf16")),
    "cyclic": ("cyclic", "universal", (3, "dp", "rowwise_adam", "world", "block", "bf16")),
    "converted": ("cyclic", "converted", (2, "dp", "rowwise_adam", "world", "block", "bf16")),
    "embed": ("embed", "universal", (1, "tp", "rowwise_adam", "vocab", "block", "fp32")),
    "embed, ZeRO 0": ("embed", "universal", (0, "tp", "rowwise_adam", "world", "cyclic", "fp32")),
}


def engine_of(case: Case, mpus: dict[str, Any], *, loads_universal: bool = False) -> Any:
    stage, layout, kind, strategy, placement, dtype = case
    table = {"optimizer": kind, "weight_decay": DECAY}
    more: dict[str, Any] = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    ds_config = config(stage, table, strategy=strategy, **more)
    ds_config["tp_embed"]["placement"] = placement
    ds_config["checkpoint"] = {"load_universal": loads_universal}
    return make(layout, ds_config, mpus)


def state_of(engine: Any) -> dict[str, Any]:
    """The whole table, and the whole states of its optimizer."""
    module, optimizer = engine.module, engine.tp_embed_tables.optimizers["ngram"]
    with hook_state_dict(module, optimizer=optimizer):
        table: Tensor = module.state_dict()["ngram.weight"]
        state = optimizer.state_dict()["state"].get(0, {})
    group = {key: v for key, v in optimizer.param_groups[0].items() if key != "params"}
    return copy.deepcopy({"weight": table, **state, "group": group})


def ids_of(mpus: dict[str, Any], case: Case) -> Tensor:
    mpu = mpus[case[1]]
    return batches(dist.get_rank() if mpu is None else replica_of(mpu))


def save(out: Path, mpus: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, case in SAVED.items():
        engine = engine_of(case, mpus)
        ids = ids_of(mpus, case)
        train(engine, ids)
        engine.save_checkpoint(str(out / name), client_state={"mine": 3})
        state = state_of(engine)
        export(engine, out / f"{name} exported")
        export(engine, out / f"{name} in fp32", dtype=torch.float32)
        seen[name] = {"state": state, "on": train(engine, ids)["losses"]}
    # A directory that can't be written, in the engine that was saved last.
    (out / name / "next").mkdir(exist_ok=True)
    (out / name / "next" / "tp_embed_own_tables").touch()
    dist.barrier()
    try:
        engine.save_checkpoint(str(out / name), tag="next")
    except Exception as e:
        seen["failed"] = f"{type(e).__name__}: {e}"
    # Without states, and with another optimizer.
    for name in ("copies", "ZeRO 3"):
        weights = engine_of(SAVED[name], mpus)
        weights.load_checkpoint(str(out / name), load_optimizer_states=False)
        seen[f"weights of {name}"] = state_of(weights)
    other = engine_of((0, "dp", "lazy_adam", "vocab", "block", "fp32"), mpus)
    before = other.module.mix.weight.detach().clone()
    try:
        other.load_checkpoint(str(out / "copies"))
    except ValueError as e:
        seen["other"] = str(e)
    seen["unchanged"] = torch.equal(before, other.module.mix.weight)
    ds_config = config(0, {})
    ds_config["tp_embed"].pop("tables")
    without = make("dp", ds_config, mpus)
    try:
        without.load_checkpoint(str(out / "copies"), load_module_strict=False)
    except ValueError as e:
        seen["without"] = str(e)
    return seen


def load(out: Path, mpus: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, (saved, way, case) in LOADED.items():
        engine = engine_of(case, mpus, loads_universal=way == "config")
        if way == "universal":
            _, client = load_universal(engine, out / f"{saved} universal")
        else:
            folder = {"engine": saved, "config": f"{saved} universal"}.get(way, f"{saved} {way}")
            _, client = engine.load_checkpoint(str(out / folder))
        state = state_of(engine)
        losses = train(engine, ids_of(mpus, case))["losses"]
        seen[name] = {"state": state, "losses": losses, "mine": client["mine"]}
    return seen


def main(out: Path, phase: str) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    ranks = list(range(dist.get_world_size()))
    mpus: dict[str, Any] = {"plain": None, "tp": mpu_over([ranks])}
    mpus["dp"] = mpu_over([[rank] for rank in ranks])
    seen = (save if phase == "save" else load)(out, mpus)
    torch.save(seen, out / f"{phase}{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
