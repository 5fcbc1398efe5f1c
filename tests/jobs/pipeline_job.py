"""Run by the `deepspeed` launcher on four ranks for test_pipeline.py: trains small pipelines, and
saves the results by case and rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from tp_embed import (
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
    init_scaled_embedding,
)
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from train_pipeline import Block, Positions, build

VOCAB, DIM, SEQ, LAYERS, HEADS, SEED = 101, 30, 12, 2, 3, 7  # 101 rows do not divide by two ranks.
STEPS, MICRO_BATCHES, BATCH = 4, 3, 2
LR, EPS = 1e-2, 1e-4  # With a small eps, Adam amplifies the rounding of tiny gradients.

TABLE = "tied_modules.embed.weight"

CASES: dict[str, dict[str, Any]] = {
    "tied, ZeRO 0": {"stage": 0, "clip": 0.0},
    "tied, ZeRO 1": {"stage": 1, "clip": 0.5},
    "untied, ZeRO 1": {"stage": 1, "clip": 0.5, "tied": False},
    "tied, ZeRO 1, DP 2": {"stage": 1, "clip": 0.5, "tp": 1},
}


def micro_batches(data_rank: int = 0, data_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ids and targets of one of ``data_size`` pipelines."""
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(VOCAB, (data_size, BATCH, SEQ + 1), generator=generator)[data_rank]
        yield tokens[:, :-1], tokens[:, 1:]


class Alone(nn.Module):
    """The same model with torch's embedding and projection, and the same names of layers."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        table = StandardEmbedding(VOCAB, DIM, init_fn=init_scaled_embedding)
        self.embed = nn.Embedding(VOCAB, DIM, _weight=table.weight.detach())
        self.head = None if tied else seeded(LAYERS + 3, nn.Linear, DIM, VOCAB, bias=False)
        self.between = nn.Sequential(
            seeded(1, Positions, SEQ, DIM),
            *(seeded(i, Block, DIM, HEADS) for i in range(2, LAYERS + 2)),
            seeded(LAYERS + 2, nn.LayerNorm, DIM),
        )

    def forward(self, ids: Tensor) -> Tensor:
        head = self.embed if self.head is None else self.head
        return linear(self.between(self.embed(ids)), head.weight)

    def layers(self) -> dict[str, Tensor]:
        """Returns the Parameters by their names in the pipeline."""
        state = self.between.state_dict()
        named = {
            f"{int(number) + 1}.{name}": tensor
            for number, name, tensor in ((*key.split(".", 1), t) for key, t in state.items())
        }
        if self.head is None:
            return {TABLE: self.embed.weight.detach(), **named}
        head = {f"{LAYERS + 3}.weight": self.head.weight.detach()}
        return {"0.weight": self.embed.weight.detach(), **named, **head}


def seeded(number: int, layer: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(SEED + number)
    return layer(*args, **kwargs)


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def train_alone(clip: float, tied: bool = True, pipelines: int = 1) -> dict[str, Any]:
    """Runs the same training in one process of plain torch."""
    model = Alone(tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.01)
    streams = [micro_batches(rank, pipelines) for rank in range(pipelines)]
    batches = [next(stream) for _ in range(STEPS * MICRO_BATCHES) for stream in streams]
    in_step = MICRO_BATCHES * pipelines
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(model, batches[step * in_step : (step + 1) * in_step])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    evaluated = mean_loss(model, batches[:in_step])
    return {
        "losses": losses,
        "norms": norms,
        "state": model.layers(),
        "evaluated": evaluated.item(),
    }


def mean_loss(model: Alone, batches: list[Any]) -> Tensor:
    return torch.stack([token_loss(model(ids), target) for ids, target in batches]).mean()


def pipeline(
    gang: DeepSpeedGang, topology: Any, *, tied: bool = True, plain: bool = False, seed: int = SEED
) -> PipelineModule:
    """Builds the example's pipeline, or an untied one, with its table cut over columns or whole."""
    if tied:
        sizes = {"seq_len": SEQ, "dim": DIM, "heads": HEADS, "layers": LAYERS}
        return build(gang, topology, vocab_size=VOCAB, seed=seed, **sizes)
    table = LayerSpec(ShardedEmbedding, gang, VOCAB, DIM, init_fn=init_scaled_embedding)
    specs = [
        LayerSpec(nn.Embedding, VOCAB, DIM) if plain else table,
        LayerSpec(Positions, SEQ, DIM),
        *(LayerSpec(Block, DIM, HEADS) for _ in range(LAYERS)),
        LayerSpec(nn.LayerNorm, DIM),
        LayerSpec(nn.Linear, DIM, VOCAB, bias=False),
    ]
    return PipelineModule(
        specs,
        topology=topology,
        loss_fn=token_loss,
        partition_method="type:Block",
        seed_layers=True,
        seed_fn=torch.manual_seed,
        base_seed=seed,
    )


def start(model: PipelineModule, stage: int, clip: float | None) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    if clip is not None:
        config["gradient_clipping"] = clip
    return initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(
    checkpoint: Path, *, stage: int, clip: float, tied: bool = True, tp: int = 2
) -> dict[str, Any]:
    """Trains, saves half-way, and resumes from there in another engine."""
    topology = PipeModelDataParallelTopology(2, tp, 2 // tp)
    grid = PipelineParallelGrid(topology)
    gang = DeepSpeedGang.from_mpu(grid)
    batches = micro_batches(grid.get_data_parallel_rank(), grid.get_data_parallel_world_size())
    half = [next(batches) for _ in range(STEPS // 2 * MICRO_BATCHES)]
    rest = [next(batches) for _ in range(STEPS // 2 * MICRO_BATCHES)]

    engine = start(pipeline(gang, topology, tied=tied), stage, clip)
    seen = {"gang": DeepSpeedGang.from_engine(engine).global_ranks, "start": whole_state(engine)}
    before = steps(engine, half)
    engine.save_checkpoint(str(checkpoint))
    after = steps(engine, rest)
    seen["steps"] = before + after
    seen["state"] = whole_state(engine)
    seen["evaluated"] = engine.eval_batch(iter(half)).item()

    other = start(pipeline(gang, topology, tied=tied, seed=SEED + 1000), stage, clip)
    other.load_checkpoint(str(checkpoint))
    seen["expected"], seen["resumed"] = after, steps(other, rest)
    seen["resumed state"] = whole_state(other)
    return seen


def steps(engine: Any, batches: list[Any]) -> list[tuple[float, float | None]]:
    """Returns the loss and gradient norm of each step; DeepSpeed has norms only with ZeRO."""
    seen, iterator = [], iter(batches)
    for _ in range(len(batches) // MICRO_BATCHES):
        loss = engine.train_batch(iterator).item()
        norm = engine.get_global_grad_norm()
        seen.append((loss, None if norm is None else float(norm)))
    return seen


def whole_state(engine: Any) -> dict[str, Tensor]:
    """Returns the state of this stage, with the table whole."""
    state = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    for name, module in engine.module.named_modules():
        if isinstance(module, (ShardedEmbedding, VocabShardedEmbedding)):
            state[f"{name}.weight"] = module.to_embedding().weight.detach()
    return state


def refusals() -> dict[int, str]:
    """Returns the errors of `initialize()`, by the number of stages."""
    seen = {}
    for stages, zero in ((1, 1), (2, 0)):
        topology = PipeModelDataParallelTopology(stages, 2, 2 // stages)
        gang = DeepSpeedGang.from_mpu(PipelineParallelGrid(topology))
        model = pipeline(gang, topology, tied=False, plain=True)
        try:
            start(model, zero, clip=None)
        except ValueError as e:
            seen[stages] = str(e)
    return seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen: dict[str, Any] = {name: train(out / name, **case) for name, case in CASES.items()}
    seen["refused"] = refusals()
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
