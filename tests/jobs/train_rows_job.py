"""Run by the `deepspeed` launcher on four ranks for test_train_rows_engines.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from engines_job import batches, config, mpu_over, step
from tp_embed import shardwise
from tp_embed.integrations.deepspeed import initialize

V, E, ROWS = 23, 8, [2, 3, 5, 11, 20, 22]
MASK = torch.zeros(V, 1).index_fill_(0, torch.tensor(ROWS), 1.0)
CASES = [(stage, strategy) for stage in range(4) for strategy in ("embed", "vocab")]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(V, E), nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.mix(self.embed(ids)).tanh())
        return nn.functional.cross_entropy(logits[:-1], ids[1:])


def build() -> Tied:
    torch.manual_seed(0)
    return Tied()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def train_alone() -> tuple[list[float], torch.Tensor]:
    """Trains in one process of plain torch, with a masking hook."""
    model = build()
    model.embed.weight.register_hook(lambda grad: grad * MASK)
    optimizer, losses = optimizer_of(model), []
    for ids in zip(batches(0), batches(1), strict=True):
        optimizer.zero_grad()
        loss = torch.stack([model(row) for row in ids]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.embed.weight.detach()


def train(mpu: Any, stage: int, strategy: str) -> tuple[list[float], torch.Tensor]:
    model = build()
    model.embed.weight.no_weight_decay = True  # type: ignore[attr-defined]
    section = {"strategy": strategy, "train_rows": {"embed": ROWS}}
    ds_config = config(stage, tp_embed=section)
    del ds_config["optimizer"]
    engine, *_ = initialize(model=model, mpu=mpu, optimizer=optimizer_of(model), config=ds_config)
    losses = [step(engine, ids) for ids in batches(mpu.get_data_parallel_rank())]
    embed = engine.module.embed
    assert embed.weight.no_weight_decay
    with deepspeed.zero.GatheredParameters([embed.weight], enabled=stage == 3):
        return losses, embed.to_embedding().weight.detach().clone()


def zero_init(mpu: Any) -> list[Any]:
    """Returns the attributes of a Parameter of `deepspeed.zero.Init`."""
    found: list[Any] = []
    for marked in (False, True):
        torch.manual_seed(0)
        ds_config = config(3, tp_embed={"strategy": "vocab"})
        with deepspeed.zero.Init(
            config_dict_or_path=config(3), data_parallel_group=mpu.get_data_parallel_group()
        ):
            model = Tied()
        model.head.weight = model.embed.weight
        weight: Any = model.embed.weight
        weight.no_weight_decay = True
        weight.register_hook(shardwise(no_gradient) if marked else lambda grad: grad * MASK)
        start = None
        try:
            engine, *_ = initialize(model=model, mpu=mpu, config=ds_config)
        except ValueError as e:
            found.append(str(e))
            continue
        embed = engine.module.embed
        for ids in batches(mpu.get_data_parallel_rank()):
            with deepspeed.zero.GatheredParameters([embed.weight]):
                start = embed.weight.to_local().clone() if start is None else start
            step(engine, ids)
        with deepspeed.zero.GatheredParameters([embed.weight]):
            found += [embed.weight.no_weight_decay, torch.equal(start, embed.weight.to_local())]
    return found


def no_gradient(grad: torch.Tensor) -> torch.Tensor:
    return grad * 0


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    mpu = mpu_over([[0, 1], [2, 3]])
    seen: dict[str, Any] = {f"{case}": train(mpu, *case) for case in CASES}
    seen["zero.Init"] = zero_init(mpu)
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
