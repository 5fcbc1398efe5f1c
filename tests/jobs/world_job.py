"""Run by the `deepspeed` launcher on four ranks for test_world_engines.py: engines with a table
that is sharded over all ranks. Saves what was seen, by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from engines_job import LR, STEPS, batches, config, mpu_over, step
from tp_embed import Gang, RowWiseEmbedding, StandardEmbedding
from tp_embed.integrations.deepspeed import DeepSpeedGang, export, initialize
from tp_embed.integrations.transformers.shard import shard_by_config

V, E, BUCKETS, CLIP = 23, 8, 50, 0.3
RULES = {"ngram": "world"}


class Model(nn.Module):
    """A model with a hashed table of pairs of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ngram = nn.Embedding(V, E), nn.Embedding(BUCKETS, E)
        self.mix, self.head = nn.Linear(E, E), nn.Linear(E, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        pairs = (ids[:-1] * 7 + ids[1:] * 13) % BUCKETS
        x = self.embed(ids[1:]) + self.ngram(pairs)
        return nn.functional.cross_entropy(self.head(self.mix(x).tanh())[:-1], ids[2:])


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR)


def micro_batches(dp_rank: int) -> list[torch.Tensor]:
    return batches(dp_rank) * 2


def alone(dp_size: int, *, clip: float = 0.0, accumulated: int = 1) -> list[float]:
    """The same by plain torch in one process."""
    model = build()
    optimizer, losses = adamw(model), []
    for at in range(0, 2 * STEPS, accumulated):
        optimizer.zero_grad()
        for micro in range(at, at + accumulated):
            ids = [micro_batches(rank)[micro] for rank in range(dp_size)]
            loss = torch.stack(list(map(model, ids))).mean()
            (loss / accumulated).backward()
            losses.append(loss.item())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses


def train_sparse() -> list[list[float]]:
    """A layer that the user has built, with sparse gradients."""
    losses: list[list[float]] = [[], []]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for micro in range(2 * STEPS):
        optimizer.zero_grad()
        loss = torch.stack([model(micro_batches(rank)[micro]) for rank in range(4)]).mean()
        loss.backward()
        optimizer.step()
        losses[0].append(loss.item())
    model, world = build(), DeepSpeedGang.from_world()
    table = StandardEmbedding(BUCKETS, E, sparse=True)
    table.weight = model.ngram.weight
    model.ngram = RowWiseEmbedding.from_embedding(table, world, grad_reduction="mean")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ds_config = config(0)
    del ds_config["optimizer"]
    engine = initialize(model=model, optimizer=optimizer, config=ds_config)[0]
    losses[1] = [step(engine, ids) for ids in micro_batches(dist.get_rank())]
    return losses


def engine_of(mpu: Any, placement: str, model: nn.Module | None = None, **more: Any) -> Any:
    section = {"rules": RULES, "placement": placement, **more.pop("section", {})}
    ds_config = config(0, tp_embed=section, **more)
    model = model or build()
    optimizer = None if "optimizer" in more else adamw(model)
    if optimizer is not None:
        del ds_config["optimizer"]
    return initialize(model=model, mpu=mpu, optimizer=optimizer, config=ds_config)[0]


AUTOTP: dict[str, Any] = {
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [{"patterns": [r"mix\.weight$"], "partition_type": "skip"}],
    },
}


def train(mpu: Any, placement: str, **more: Any) -> list[float]:
    engine = engine_of(mpu, placement, **more)
    rank = dist.get_rank() if mpu is None else mpu.get_data_parallel_rank()
    if "tensor_parallel" in more:
        rank //= 2
    table = engine.module.ngram
    assert isinstance(table, RowWiseEmbedding)
    assert table.gang.size == 4
    assert table.placement == placement
    return [step(engine, ids) for ids in micro_batches(rank)]


def resumed(mpu: Any, out: Path) -> dict[str, Any]:
    """Trains, saves, and goes on from the checkpoint by another placement."""
    ids = micro_batches(mpu.get_data_parallel_rank())
    engine = engine_of(mpu, "cyclic")
    losses = [step(engine, ids[0])]
    engine.save_checkpoint(str(out / "run"), tag="first")
    export(engine, out / "exported")
    losses += [step(engine, batch) for batch in ids[1:]]
    again = engine_of(mpu, "block")
    again.load_checkpoint(str(out / "run"), tag="first")
    file = torch.load(out / "run" / "first" / "mp_rank_00_model_states.pt", weights_only=False)
    return {
        "losses": losses,
        "again": [step(again, batch) for batch in ids[1:]],
        "shape": tuple(file["module"]["ngram.weight"].shape),
        "saved": file["module"]["ngram.weight"],
        "exported": load_file(out / "exported" / "model.safetensors")["ngram.weight"],
    }


def refusal(action: Any) -> str:
    try:
        action()
    except (ValueError, KeyError) as e:
        return str(e)
    return ""


def with_sum(gang: Gang) -> Model:
    model = build()
    model.ngram = RowWiseEmbedding(gang, BUCKETS, E)
    return model


def by_plain_deepspeed(mpu: Any) -> None:
    model = with_sum(DeepSpeedGang.from_world())
    engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=config(0))
    step(engine, batches(0)[0])


def refusals(mpu: Any) -> dict[str, str]:
    stage = {"zero_optimization": {"stage": 2}}
    world = DeepSpeedGang.from_world()
    tied = build()
    tied.head.weight = nn.Parameter(torch.zeros(BUCKETS, E))
    tied.ngram.weight = tied.head.weight
    return {
        "stage": refusal(lambda: engine_of(None, "block", **stage)),
        "bf16": refusal(lambda: engine_of(None, "block", bf16={"enabled": True})),
        "lamb": refusal(lambda: engine_of(None, "block", optimizer={"type": "Lamb"})),
        "sum": refusal(lambda: engine_of(None, "block", with_sum(world), section={"rules": {}})),
        "tied": refusal(lambda: engine_of(mpu, "block", tied)),
        "export": refusal(lambda: engine_of(mpu, "block").save_16bit_model("nowhere")),
        "plain": refusal(lambda: by_plain_deepspeed(mpu)),
        "trainer": refusal(lambda: shard_by_config(build(), {"tp_embed": {"rules": RULES}})),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    mpu = mpu_over([[0, 1], [2, 3]])
    more = {"gradient_clipping": CLIP, "gradient_accumulation_steps": 2}
    seen = {
        "dp": train(None, "block"),
        "dp, clipped": train(None, "cyclic", gradient_clipping=CLIP),
        "sparse": train_sparse(),
        # DeepSpeed keeps tensor-parallel groups for all later engines.
        "autotp": train(None, "cyclic", tensor_parallel=AUTOTP, gradient_clipping=CLIP),
        "tp x dp": train(mpu, "cyclic"),
        "tp x dp, clipped": train(mpu, "block", **more),
        "resumed": resumed(mpu, out),
        "refusals": refusals(mpu),
    }
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
