"""A part of engines_job.py: memory of gradients that is used again, and sparse gradients."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn

from engines_job import (
    AUTOTP,
    LR,
    STEPS,
    E,
    Model,
    V,
    batches,
    build,
    config,
    mpu_over,
    step,
    train,
)
from tp_embed import shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize


def sparse() -> list[float]:
    model = build(sparse=True)
    without = {key: value for key, value in config(stage=0).items() if key != "optimizer"}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = initialize(model=model, optimizer=optimizer, config=without, mpu=groups)
    assert engine.module.embed.sparse
    return train(engine)


# ZeRO stage, ranks of a gang, and what else the DeepSpeed config has.
REUSE: dict[str, tuple[int, int, dict[str, Any]]] = {
    "zero 0, no data-parallel ranks": (0, 4, {"gradient_clipping": 0.05}),
    "zero 1": (1, 2, {}),
    "zero 1, bf16, accumulated, clipped": (
        1,
        2,
        {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2, "gradient_clipping": 0.05},
    ),
    "zero 1, larger than a bucket": (
        1,
        2,
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 50}},
    ),
    "zero 2, accumulated, clipped": (
        2,
        2,
        {"gradient_accumulation_steps": 2, "gradient_clipping": 0.05},
    ),
    "zero 2, not contiguous": (
        2,
        2,
        {"zero_optimization": {"stage": 2, "contiguous_gradients": False}},
    ),
    "zero 3, bf16, accumulated, clipped": (
        3,
        2,
        {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2, "gradient_clipping": 0.05},
    ),
}


def reuse_grad() -> dict[str, list[Any]]:
    """Losses and tables of engines whose gradients are in the same memory or in new memory."""
    return {
        name: [
            train_table(initialize, stage, tp_size, {"tp_embed": {"reuse_grad": reuse}, **more})
            for reuse in (False, True)
        ]
        for name, (stage, tp_size, more) in REUSE.items()
    }


def reuse_grad_unchecked() -> list[Any]:
    """What `initialize()` refuses, as DeepSpeed would do it."""

    def build_engine(model: Model, config: dict[str, Any], mpu: Any) -> Any:
        shard_embeddings(model, DeepSpeedGang.from_mpu(mpu), **config.pop("tp_embed"))
        return deepspeed.initialize(model=model, config=config, mpu=mpu)

    return [
        train_table(build_engine, 0, 2, {"tp_embed": {"reuse_grad": reuse}})
        for reuse in (False, True)
    ]


def train_table(build_engine: Any, stage: int, tp_size: int, more: dict[str, Any]) -> Any:
    ranks = torch.arange(4).view(-1, tp_size).tolist()
    mpu = mpu_over(ranks)
    engine, *_ = build_engine(model=build(), config=config(stage, **more), mpu=mpu)
    accumulated = more.get("gradient_accumulation_steps", 1)
    generator = torch.Generator().manual_seed(mpu.get_data_parallel_rank())
    ids = torch.randint(V, (STEPS * accumulated, 4), generator=generator)
    losses = [step(engine, batch) for batch in ids]
    table = engine.module.embed.weight
    with deepspeed.zero.GatheredParameters([table]):
        return losses, table.detach().clone()


def sparse_volumes() -> dict[str, Any]:
    """What two data-parallel ranks exchange of the gradients of a table of 500 rows."""
    seen: dict[str, Any] = {}
    for sparse in (False, True):
        model = build()
        model.embed = nn.Embedding(500, E)
        without = {key: value for key, value in config(stage=0).items() if key != "optimizer"}
        more = {"tp_embed": {"sparse": sparse}, "comms_logger": {"enabled": True}}
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine, *_ = initialize(model=model, optimizer=optimizer, config=without | AUTOTP | more)
        losses = train(engine)
        seen_by_deepspeed = deepspeed.comm.comm.comms_logger.comms_dict
        seen["sparse" if sparse else "dense"] = {
            "losses": losses,
            "bytes": {
                op: sorted((int(size), calls[0]) for size, calls in sizes.items())
                for op, sizes in seen_by_deepspeed.items()
                if op in ("all_reduce", "all_gather")
            },
        }
        seen_by_deepspeed.clear()
    deepspeed.comm.comm.comms_logger.enabled = False
    seen["rows"] = [
        max(len(batches(dp_rank)[i].unique()) for dp_rank in range(2)) for i in range(STEPS)
    ]
    return seen


def sparse_clipped_unchecked() -> list[float]:
    """How far a step moves the table, without clipping and with it, where gradients are sparse."""
    moved = []
    for clipping in (0.0, 1e-3):
        model = build(sparse=True)
        before = model.embed.weight.detach().clone()
        without = {key: value for key, value in config(stage=0).items() if key != "optimizer"}
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=without | {"gradient_clipping": clipping},
            mpu=groups,
        )
        step(engine, batches(groups.get_data_parallel_rank())[0])
        moved.append(float((model.embed.weight.detach() - before).norm()))
    return moved
