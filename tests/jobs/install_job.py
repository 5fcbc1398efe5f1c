"""Run on two ranks for test_install.py: programs that know nothing of tp_embed make engines. Saves
what was seen, by rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from transformers import trainer as hf_trainer

import hf_trainer_job
from engines_job import AUTOTP, batches, build, config, step
from hf_models import build as build_hf
from tp_embed.integrations.deepspeed import install, uninstall

SECTION: dict[str, Any] = {"tp_embed": {"strategy": "vocab"}}


def kinds(model: Any) -> list[str]:
    return [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("tp_embed")]


def train(engine: Any) -> dict[str, Any]:
    return {"losses": [step(engine, ids) for ids in batches(0)], "kinds": kinds(engine.module)}


def by_deepspeed(stage: int, how: str) -> dict[str, Any]:
    model, ds_config = build(), config(stage, **AUTOTP, **SECTION)
    parameters = model.parameters()
    if how == "positions":
        engine, *_ = deepspeed.initialize(None, model, None, parameters, config=ds_config)
    elif how == "args":
        args = SimpleNamespace(deepspeed_config=ds_config, local_rank=int(os.environ["LOCAL_RANK"]))
        engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=parameters)
        assert args.deepspeed_config is ds_config
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        del ds_config["optimizer"]
        given = {"model": model, "optimizer": optimizer, "config_params": ds_config}
        engine, *_ = deepspeed.initialize(**given)
    return train(engine)


def by_accelerate(**section: Any) -> dict[str, Any]:
    hf_trainer_job.fresh()
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ds_config = config(3, **AUTOTP, **section)
    del ds_config["optimizer"]
    PartialState(cpu=True)  # `Accelerator(cpu=True)` would not use DeepSpeed.
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config))
    engine, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for ids in batches(0):
        loss = engine(ids)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    found = {"losses": losses, "kinds": kinds(engine.module)}
    if section:
        state = accelerator.get_state_dict(engine)  # `None` on other ranks.
        found["table"] = state and state["embed.weight"]
    return found


def by_trainer(directory: Path) -> dict[str, Any]:
    hf_trainer_job.fresh()
    ds_config = hf_trainer_job.config(1, strategy="vocab")
    batch = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    args = hf_trainer_job.arguments(directory, deepspeed=ds_config, **batch)
    trainer = hf_trainer_job.train(build_hf("llama"), args)
    return {"losses": hf_trainer_job.losses(trainer), "kinds": kinds(trainer.model)}


def refusal() -> str:
    """Makes an engine with a section that nobody reads."""
    try:
        deepspeed.initialize(model=build(), config=config(1, **AUTOTP, **SECTION))
    except ValueError as e:
        return str(e)
    return "no error"


def main(directory: Path) -> None:
    deepspeed.init_distributed("gloo")
    before = deepspeed.initialize
    seen: dict[str, Any] = {"without": refusal()}
    seen["accelerate alone"] = by_accelerate()
    install()
    install()
    seen["no section"] = train(deepspeed.initialize(model=build(), config=config(1, **AUTOTP))[0])
    for how, stage in (("positions", 0), ("args", 1), ("optimizer", 3)):
        seen[how] = by_deepspeed(stage, how)
    seen["accelerate"] = by_accelerate(**SECTION)
    seen["trainer"] = by_trainer(directory / "trainer")
    uninstall()
    seen["restored"] = deepspeed.initialize is before
    seen["callbacks"] = [callback.__name__ for callback in hf_trainer.DEFAULT_CALLBACKS]
    torch.save(seen, directory / f"seen{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
