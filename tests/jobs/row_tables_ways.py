"""More engines for row_tables_job.py: AutoTP, and what else reads a table that is set apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from safetensors.torch import load_file

from row_tables_job import DECAY, batches, build, config, train
from tp_embed.checkpoint import hook_state_dict
from tp_embed.gang.collectives import whole_table
from tp_embed.integrations.deepspeed import export, initialize
from tp_embed.integrations.deepspeed.monitor import EngineMonitor
from tp_embed.monitor.traffic import Traffic, gangs_of

AUTOTP: dict[str, Any] = {
    "tensor_parallel": {
        "autotp_size": 2,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [{"patterns": [r"mix\.weight$"], "partition_type": "skip"}],
        },
    }
}


def ways_to_build() -> dict[str, Any]:
    """AutoTP with an optimizer of the user, with groups, offloaded, and a model of
    `deepspeed.zero.Init`."""
    seen: dict[str, Any] = {}
    table: dict[str, Any] = {"optimizer": "rowwise_adagrad", "lr": 0.3, "weight_decay": DECAY}
    ids = batches(groups.get_data_parallel_rank())
    ways = [(0, "optimizer"), (1, "groups"), (2, "optimizer"), (3, "zero.Init")]
    for stage, way in [*ways, (2, "offload"), (3, "offload")]:
        ds_config = config(stage, table) | AUTOTP
        options: dict[str, Any] = {}
        if way == "zero.Init":
            dp_group = groups.get_data_parallel_group()
            with deepspeed.zero.Init(config_dict_or_path=ds_config, data_parallel_group=dp_group):
                model = build()
        else:
            model = build()
        if way == "optimizer":
            del ds_config["optimizer"]
            options["optimizer"] = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        elif way == "offload":
            ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            ds_config["zero_force_ds_cpu_optimizer"] = False
        elif way == "groups":
            named = list(model.named_parameters())
            options["model_parameters"] = [
                {"params": [p for name, p in named if "ngram" in name], "lr": 7.0},
                {"params": [p for name, p in named if "ngram" not in name]},
            ]
        ds_config["wall_clock_breakdown"] = way == "groups"
        engine, *_ = initialize(model=model, config=ds_config, **options)
        monitor = EngineMonitor(engine, every=1)
        exchanged = Traffic(engine.tp_embed_tables.replicas)
        with exchanged, Traffic(*gangs_of(engine.module)) as looked_up:
            found: dict[str, Any] = train(engine, ids)
        seen[f"{stage} {way}"] = found
        found["timed gangs"] = len(getattr(engine, "tp_embed_timers", ()))
        found["monitored"] = [row["grad_norm"]["ngram"] for row in monitor.rows]
        found["sent"] = [traffic.total().bytes_sent for traffic in (exchanged, looked_up)]
        entries = [entry for row in monitor.rows for entry in row["traffic"].values()]
        found["monitored bytes"] = sum(entry["bytes"] for entry in entries)
    return seen


def unequal_replicas() -> torch.Tensor:
    """Returns the table, which was another one on each data-parallel rank."""
    model = build()
    with torch.no_grad():
        model.ngram.weight.add_(groups.get_data_parallel_rank())
    engine, *_ = initialize(model=model, config=config(1, {"optimizer": "lazy_adam"}) | AUTOTP)
    table: torch.Tensor = engine.module.ngram.to_embedding().weight.detach()
    return table


def whole_models(out: Path, stage: int) -> dict[str, Any]:
    """What else reads the table: exports, state dicts, monitors, and what is refused."""
    ds_config = config(stage, {"optimizer": "rowwise_adam"}) | AUTOTP | {"bf16": {"enabled": True}}
    engine, *_ = initialize(model=build(), config=ds_config)
    ids = batches(groups.get_data_parallel_rank())
    train(engine, ids)
    export(engine, out / f"export {stage}", dtype=torch.float32)
    weight = engine.module.ngram.weight
    master = engine.tp_embed_tables.optimizers["ngram"].master(weight)
    whole = whole_table(master, 0, engine.module.ngram.gang, engine.module.ngram.partition)
    with hook_state_dict(engine.module):
        hooked = engine.module.state_dict()["ngram.weight"]
    # A gradient that is thrown away.
    engine.backward(engine(ids[0, 0]))
    engine.zero_grad()
    refused = []
    for action in (
        lambda: engine.save_16bit_model(str(out)),
        lambda: engine._consolidated_16bit_state_dict(),
    ):
        try:
            action()
        except (ValueError, FileNotFoundError) as e:
            refused.append(str(e))
    exported = load_file(out / f"export {stage}" / "model.safetensors")
    return {
        "exported": exported["ngram.weight"],
        "master": whole,
        "table": engine.module.ngram.to_embedding().weight.detach(),
        "hooked": hooked,
        "cleared": weight.grad is None and not engine.tp_embed_tables.gradients(),
        "refused": refused,
    }
