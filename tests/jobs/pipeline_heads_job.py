"""Run on six ranks for test_pipeline_heads.py: trains a pipeline of three stages that all use one
table, the middle one for a loss of its own, and saves the results by case and rank."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tp_embed import (
    OutputHead,
    Partition,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
    init_scaled_embedding,
)
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from tp_embed.nn.loss import cross_entropy as sharded_cross_entropy

STAGES, VOCAB, DIM, SEED = 3, 23, 8, 7
STEPS, MICRO_BATCHES, LR, WEIGHT = 3, 4, 1e-2, 0.3

CASES: dict[str, dict[str, Any]] = {
    "rows, ZeRO 0": {"kind": VocabShardedEmbedding, "stage": 0, "clip": 0.0},
    "rows, ZeRO 1": {"kind": VocabShardedEmbedding, "stage": 1, "clip": 0.5},
    "columns, ZeRO 1": {"kind": ShardedEmbedding, "stage": 1, "clip": 0.5},
}

Pair = tuple[Tensor, Tensor]


class Mix(nn.Module):
    """Mixes each position with the mean of those before, and passes the ids on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, pair: Pair) -> Pair:
        x, ids = pair
        counts = torch.arange(1, x.size(1) + 1)[:, None]
        return x + self.linear(x.cumsum(1) / counts).tanh(), ids


def look_up(embed: nn.Module, ids: Tensor) -> Pair:
    return embed(ids), ids


class AddLoss(torch.autograd.Function):
    """Returns ``x``, and trains a loss of this stage as well, as Megatron's ``MTPLossAutoScaler``
    does: the last stage need not know it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_tensor(WEIGHT / MICRO_BATCHES)


def middle_loss(embed: Any, pair: Pair) -> Pair:
    """The head of the middle stage predicts the next token."""
    x, ids = pair
    loss = OutputHead(embed).loss(x[:, :-1], ids[:, 1:])
    return AddLoss.apply(x, loss), ids


def last_logits(embed: Any, pair: Pair) -> Tensor:
    head = OutputHead(embed) if embed.shard_dim else OutputHead(embed, output="shard")
    logits: Tensor = head(pair[0])
    return logits


def seeded_mix(number: int) -> Mix:
    torch.manual_seed(SEED + number)
    return Mix()


class Alone(nn.Module):
    """The same with one table of torch, in one process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        table = StandardEmbedding(VOCAB, DIM, init_fn=init_scaled_embedding)
        self.embed = nn.Embedding(VOCAB, DIM, _weight=table.weight.detach())
        self.mixes = nn.ModuleList(map(seeded_mix, (1, 2, 4)))

    def forward(self, ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses of the middle head and of the last one."""
        first, second, third = self.mixes
        pair = second(first((self.embed(ids), ids)))
        logits = pair[0][:, :-1] @ self.embed.weight.T
        middle = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        logits = third(pair)[0] @ self.embed.weight.T
        return middle, cross_entropy(logits.flatten(0, 1), target.flatten())


def micro_batches() -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (STEPS * MICRO_BATCHES, 2, 7), generator=generator)
    return [(each[:, :-1], each[:, 1:]) for each in tokens]


def train_alone(clip: float) -> dict[str, Any]:
    model = Alone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-4)
    losses, norms = [], []
    batches = iter(micro_batches())
    for _ in range(STEPS):
        optimizer.zero_grad()
        both = [model(*next(batches)) for _ in range(MICRO_BATCHES)]
        middle, last = (torch.stack(losses).mean() for losses in zip(*both, strict=True))
        (WEIGHT * middle + last).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        losses.append(last.item())
    return {"losses": losses, "norms": norms, "table": model.embed.weight.detach()}


def train(kind: Any, stage: int, clip: float) -> dict[str, Any]:
    topology = PipeModelDataParallelTopology(STAGES, 2, 1)
    gang = DeepSpeedGang.from_mpu(PipelineParallelGrid(topology))
    tied: Any = partial(
        TiedLayerSpec,
        "embed",
        kind,
        gang,
        VOCAB,
        DIM,
        init_fn=init_scaled_embedding,
        tied_weight_attr="weight",
    )

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if kind is VocabShardedEmbedding:
            return sharded_cross_entropy(logits, target, gang, Partition(VOCAB, gang.size))
        return cross_entropy(logits.flatten(0, 1), target.flatten())

    model = PipelineModule(
        [
            tied(forward_fn=look_up),
            LayerSpec(Mix),
            LayerSpec(Mix),
            tied(forward_fn=middle_loss),
            LayerSpec(Mix),
            tied(forward_fn=last_logits),
        ],
        topology=topology,
        loss_fn=loss,
        partition_method="type:Mix|Sharded",
        seed_layers=True,
        seed_fn=torch.manual_seed,
        base_seed=SEED,
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": clip,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "eps": 1e-4, "weight_decay": 0.01, "torch_adam": True},
        },
        "zero_optimization": {"stage": stage},
    }
    engine = initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    batches = iter(micro_batches())
    seen: dict[str, list[float]] = {"losses": [], "norms": []}
    for _ in range(STEPS):
        seen["losses"].append(engine.train_batch(batches).item())
        seen["norms"].append(float(engine.get_global_grad_norm() or 0.0))
    table = engine.module.tied_modules["embed"].to_embedding().weight.detach()
    return {**seen, "table": table, "pipeline stage": engine.stage_id}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen = {name: train(**case) for name, case in CASES.items()}
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
