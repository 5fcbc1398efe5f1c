"""Run by the `deepspeed` launcher on four ranks for test_row_tables_engines.py: engines whose table
has an optimizer of its own. Saves what was seen, by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from engines_job import mpu_over
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from tp_embed.integrations.deepspeed.monitor import EngineMonitor

V, W, E, STEPS, MICRO, CLIP, DECAY = 23, 37, 8, 4, 2, 0.2, 0.2
KINDS = "rowwise_adagrad", "rowwise_adam", "lazy_adam"
LAYOUTS = {"tp2dp2": [[0, 1], [2, 3]], "tp4": [[0, 1, 2, 3]], "dp4": [[0], [1], [2], [3]]}
# Each stage with each layout, and each optimizer and strategy with each stage.
CASES = [
    (stage, layout, KINDS[(stage + i) % 3], ("vocab", "embed")[(stage // 2 + i) % 2])
    for stage in range(4)
    for i, layout in enumerate(LAYOUTS)
]
CASES += [(0, "dp4", "lazy_adam", "world"), (1, "tp2dp2", "rowwise_adagrad", "world")]
CASES += [(2, "dp4", "rowwise_adam", "world"), (3, "tp2dp2", "lazy_adam", "world")]


class Model(nn.Module):
    """Adds rows of a table of hashed pairs of ids to the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ngram = nn.Embedding(V, E), nn.Embedding(W, E, padding_idx=3)
        self.mix, self.head = nn.Linear(E, E), nn.Linear(E, V)
        self.boost = 1.0

    def pairs(self, ids: torch.Tensor) -> torch.Tensor:
        return (5 * ids + 11 * ids.roll(1)) % W

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.ngram(self.pairs(ids))
        if self.boost != 1.0 and found.requires_grad:
            found.register_hook(lambda grad: grad * self.boost)
        logits = self.head(self.mix(self.embed(ids) + found).tanh())
        return nn.functional.cross_entropy(logits[:-1].float(), ids[1:])


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def batches(replica: int) -> torch.Tensor:
    """The ids of a data-parallel rank. *Shape:* :math:`(steps,micro,ids)`. Some steps use few."""
    generator = torch.Generator().manual_seed(replica)
    ids = torch.randint(V, (STEPS, MICRO, 12), generator=generator)
    ids[1:3] %= 4
    return ids


def config(stage: int, table: dict[str, Any], **more: Any) -> dict[str, Any]:
    warmup = {"warmup_min_lr": 0.02, "warmup_max_lr": 0.1, "warmup_num_steps": 3}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {**warmup, "warmup_type": "linear"}},
        "tp_embed": {"rules": {"ngram": more.pop("strategy", "vocab")}, "tables": {"ng*": table}},
        **more,
    }


def make(layout: str, ds_config: dict[str, Any], mpus: dict[str, Any], **options: Any) -> Any:
    engine, *_ = initialize(model=build(), config=ds_config, mpu=mpus[layout], **options)
    return engine


def replica_of(mpu: Any) -> int:
    return int(mpu.get_data_parallel_rank())


def train(engine: Any, ids: torch.Tensor) -> dict[str, list[Any]]:
    seen: dict[str, list[Any]] = {"losses": [], "rates": [], "norms": []}
    for step in ids:
        total = torch.zeros(())
        seen["rates"].append(engine.get_lr()[0])
        for micro in step:
            loss = engine(micro)
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / MICRO
        dist.all_reduce(total)
        seen["losses"].append(float(total) / dist.get_world_size())
        norm = engine.get_global_grad_norm()
        seen["norms"].append(None if norm is None else float(norm))
    return seen


def case(mpus: dict[str, Any], stage: int, layout: str, kind: str, strategy: str) -> dict[str, Any]:
    table: dict[str, Any] = {"optimizer": kind, "weight_decay": DECAY}
    if stage % 2:
        table["lr"] = 0.3
    engine = make(layout, config(stage, table, strategy=strategy), mpus)
    monitor = EngineMonitor(engine, every=1)
    seen: dict[str, Any] = train(engine, batches(replica_of(mpus[layout])))
    seen["updated"] = [row["updated_rows"] for row in monitor.rows]
    assert "ngram.weight" not in dict(engine.module.named_parameters())
    seen["table"] = engine.module.ngram.to_embedding().weight.detach().clone()
    with deepspeed.zero.GatheredParameters([engine.module.mix.weight]):
        seen["mix"] = engine.module.mix.weight.detach().clone()
    return seen


def resume(mpus: dict[str, Any], out: Path, stage: int, half: str | None) -> dict[str, Any]:
    """Trains on, and again from a checkpoint."""
    layout, folder = "tp2dp2", out / f"saved_{stage}_{half}"
    more: dict[str, Any] = {}
    if half == "bf16":
        more["bf16"] = {"enabled": True}
    elif half == "fp16":
        more["fp16"] = {"enabled": True, "initial_scale_power": 8}
    elif half == "world":  # In fp32.
        more["strategy"] = "world"
    ds_config = config(stage, {"optimizer": "rowwise_adam", "weight_decay": DECAY}, **more)
    ids = batches(replica_of(mpus[layout]))
    engine = make(layout, ds_config, mpus)
    first = train(engine, ids)
    engine.save_checkpoint(str(folder), client_state={"mine": 3})
    on = train(engine, ids)
    again = make(layout, ds_config, mpus)
    _, client_state = again.load_checkpoint(str(folder))
    table = engine.module.ngram.weight
    loaded = train(again, ids)
    return {
        "first": first,
        "on": on,
        "again": loaded,
        "mine": client_state["mine"],
        "dtype": str(table.dtype),
        "same": torch.equal(again.module.ngram.weight.to_local(), table.to_local()),
        "master": torch.equal(
            again.tp_embed_tables.optimizers["ngram"].master(again.module.ngram.weight),
            engine.tp_embed_tables.optimizers["ngram"].master(table),
        ),
    }


def overflow(mpus: dict[str, Any], stage: int) -> list[Any]:
    """In the second of three steps only the gradient of the table overflows."""
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    engine = make("tp2dp2", config(stage, {"optimizer": "rowwise_adagrad"}, fp16=fp16), mpus)
    seen = []
    for i, step in enumerate(batches(replica_of(mpus["tp2dp2"]))[:3]):
        before = engine.module.ngram.weight.to_local().clone()
        for micro in step:
            engine.module.boost = float("inf") if i == 1 else 1.0
            engine.backward(engine(micro))
            engine.step()
        same = torch.equal(before, engine.module.ngram.weight.to_local())
        optimizer = engine.tp_embed_tables.optimizers["ngram"]
        steps = optimizer.state[engine.module.ngram.weight].get("step", 0)
        scale = engine.optimizer.loss_scale
        seen.append((engine.was_step_applied(), same, steps, float(scale)))
    return seen


def main(out: Path) -> None:
    import row_tables_ways  # It imports from here.

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    # DeepSpeed refuses fp16 on CPUs, whose kernels can be slow.
    get_accelerator().is_fp16_supported = lambda: True
    mpus = {name: mpu_over(ranks) for name, ranks in LAYOUTS.items()}
    seen: dict[str, Any] = {f"{each}": case(mpus, *each) for each in CASES}
    for stage, half in [
        (0, None),
        (1, "bf16"),
        (2, "fp16"),
        (3, "bf16"),
        (3, "world"),
        (1, "world"),
    ]:
        seen[f"resume {stage} {half}"] = resume(mpus, out, stage, half)
    for stage in (1, 2, 3):
        seen[f"overflow {stage}"] = overflow(mpus, stage)
    DeepSpeedGang.from_groups(tp_size=2)
    seen["ways"] = row_tables_ways.ways_to_build()
    seen["unequal"] = row_tables_ways.unequal_replicas()
    for stage in (1, 3):
        seen[f"whole {stage}"] = row_tables_ways.whole_models(out, stage)
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
