"""Run by the `deepspeed` launcher on four ranks for test_engines.py: two engines in a process,
engines that are out of the ordinary, and what `initialize()` refuses. Saves what was seen, by rank.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from tp_embed import Gang, GangError
from tp_embed.checkpoint import hook_state_dict
from tp_embed.gang.collectives import copy_to_gang, reduce_partial
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize, load_universal, to_universal

V, E, STEPS, LR = 23, 8, 3, 0.05


class Model(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, E, sparse=sparse)
        self.up = nn.Linear(E, 2 * E)
        self.down = nn.Linear(2 * E, E)
        self.norm = nn.LayerNorm(E)
        self.same = self.norm  # One module with two names.
        self.head = nn.Linear(E, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        logits = self.head(self.same(self.down(self.up(x).tanh())))
        return nn.functional.cross_entropy(logits[:-1], ids[1:])

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def build(seed: int = 0, sparse: bool = False) -> Model:
    torch.manual_seed(seed)
    return Model(sparse)


def batches(dp_rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dp_rank)
    return list(torch.randint(V, (STEPS, 12), generator=generator))


def train_alone(seed: int = 0, momentum: float = 0.9) -> list[float]:
    """The same by plain torch in one process."""
    model = build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
    losses = []
    for step in zip(batches(0), batches(1), strict=True):
        optimizer.zero_grad()
        loss = torch.stack([model(ids) for ids in step]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def step(engine: Any, ids: torch.Tensor) -> float:
    """A step on the batch of each data-parallel rank; gives their mean loss."""
    loss = engine(ids)
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def config(stage: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": LR, "momentum": 0.9}},
        "zero_allow_untested_optimizer": True,
        **more,
    }


SPECS = [
    {"patterns": [r"up\.weight$"], "partition_type": "column"},
    {"patterns": [r"down\.weight$"], "partition_type": "row"},
]
AUTOTP: dict[str, Any] = {
    "tensor_parallel": {
        "autotp_size": 2,
        "partition_config": {"use_default_specs": False, "layer_specs": SPECS},
    }
}


def mpu_over(tp_ranks: list[list[int]]) -> SimpleNamespace:
    """A Megatron-style unit with these tensor-parallel groups; the i-th ranks of each make the i-th
    data-parallel one."""
    mine: dict[str, Any] = {}
    for kind, all_ranks in (("model", tp_ranks), ("data", list(map(list, zip(*tp_ranks))))):  # noqa: B905
        for ranks in all_ranks:
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine[f"get_{kind}_parallel_group"] = lambda group=group: group
                mine[f"get_{kind}_parallel_rank"] = lambda r=ranks: r.index(dist.get_rank())
                mine[f"get_{kind}_parallel_world_size"] = lambda r=ranks: len(r)
    return SimpleNamespace(**mine)


def two_engines() -> dict[str, Any]:
    """Two engines with different gangs train by turns."""
    mpus = [mpu_over([[0, 1], [2, 3]]), mpu_over([[0, 2], [1, 3]])]
    engines = [
        initialize(model=build(seed), config=config(stage=seed + 1), mpu=mpu)[0]
        for seed, mpu in enumerate(mpus)
    ]
    losses: list[list[float]] = [[], []]
    for i, (engine, mpu, seen) in itertools.product(
        range(STEPS), zip(engines, mpus, losses, strict=True)
    ):
        seen.append(step(engine, batches(mpu.get_data_parallel_rank())[i]))
    return {
        "losses": losses,
        "gangs": [engine.module.embed.gang.global_ranks for engine in engines],
    }


class ParallelLinear(nn.Module):
    """A column- or row-parallel layer that tells of itself what Megatron's do."""

    def __init__(self, linear: nn.Linear, gang: Gang, dim: int) -> None:
        super().__init__()
        self.gang, self.dim = gang, dim
        shard = linear.weight.detach().chunk(gang.size, dim)[gang.rank].clone()
        self.weight = nn.Parameter(shard)
        told = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}
        for name, value in told.items():
            setattr(self.weight, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dim == 0:
            return nn.functional.linear(copy_to_gang(x, self.gang), self.weight)
        return reduce_partial(nn.functional.linear(x, self.weight), self.gang)


def megatron(mpu: Any, stage: int, seed: int) -> Any:
    model = build(seed)
    gang = DeepSpeedGang.from_mpu(mpu)
    model.up = ParallelLinear(model.up, gang, dim=0)
    model.down = ParallelLinear(model.down, gang, dim=1)
    adam = config(stage, optimizer={"type": "AdamW", "params": {"lr": LR, "torch_adam": True}})
    return initialize(model=model, config=adam, mpu=mpu)[0]


def mpu_checkpoint(out: Path) -> dict[str, list[float]]:
    """A universal checkpoint of a model with Megatron-style layers, from ZeRO 3 to 3 and 1, with
    units that are not DeepSpeed's groups."""
    mpu = mpu_over([[0, 2], [1, 3]])
    engine = megatron(mpu, 3, seed=0)
    ids = batches(mpu.get_data_parallel_rank())
    step(engine, ids[0])
    engine.save_checkpoint(str(out / "mpu"), tag="end")
    seen = {"before": [step(engine, ids[1]), step(engine, ids[2])]}
    if dist.get_rank() == 0:
        to_universal(out / "mpu", out / "mpu universal")
    dist.barrier()
    for stage, ranks in ((3, [[0, 2], [1, 3]]), (1, [[0, 1], [2, 3]])):
        mpu = mpu_over(ranks)
        engine = megatron(mpu, stage, seed=1)
        load_universal(engine, out / "mpu universal")
        ids = batches(mpu.get_data_parallel_rank())
        seen[f"after, ZeRO {stage}"] = [step(engine, ids[1]), step(engine, ids[2])]
    return seen


def train(engine: Any) -> list[float]:
    return [step(engine, ids) for ids in batches(groups.get_data_parallel_rank())]


def built_before() -> dict[str, list[float]]:
    """Optimizers and Parameters that were there before."""
    losses = {}
    without = {key: value for key, value in config().items() if key != "optimizer"}

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    engine, *_ = initialize(model=model, optimizer=optimizer, config=without | AUTOTP)
    losses["optimizer"] = train(engine)

    model = build()
    table = model.embed.weight
    rest = [p for p in model.parameters() if p is not table]
    split: list[dict[str, Any]] = [{"params": [table], "lr": LR}, {"params": rest}]
    engine, *_ = initialize(model=model, model_parameters=split, config=config() | AUTOTP)
    losses["groups"] = train(engine)

    model = build()
    generator = (p for p in list(model.parameters()))
    engine, *_ = initialize(model=model, model_parameters=generator, config=config() | AUTOTP)
    losses["generator"] = train(engine)
    return losses


def zero_init(by_mpu: bool) -> dict[str, Any]:
    """A model that `deepspeed.zero.Init` has partitioned when it was built."""
    ds_config = config(stage=3)
    mpu = None if not by_mpu else groups
    if not by_mpu:
        ds_config |= AUTOTP
    group = groups.get_data_parallel_group()
    with deepspeed.zero.Init(config_dict_or_path=config(stage=3), data_parallel_group=group):
        model = build()
    seen: dict[str, Any] = {"before": tuple(model.embed.weight.shape)}
    engine, *_ = initialize(model=model, config=ds_config, mpu=mpu)
    seen["after"] = tuple(engine.module.embed.weight.ds_shape)
    with hook_state_dict(engine.module):  # ZeRO 3 keeps what is its own.
        seen["hooked"] = tuple(engine.module.state_dict()["embed.weight"].shape)
    seen["losses"] = train(engine)
    return seen


def zero_init_alone() -> tuple[str, list[float]]:
    """Without tensor parallelism the model is trained as it is."""
    with deepspeed.zero.Init(config_dict_or_path=config(stage=3)):
        model = build()
    engine, *_ = initialize(model=model, config=config(stage=3))
    return type(engine.module.embed).__name__, [step(engine, ids) for ids in batches(0)]


def tp_model_init() -> tuple[str, list[int]]:
    """The size of AutoTP is not in the config."""
    model = deepspeed.tp_model_init(build(), tp_size=2, dtype=torch.float32)
    specs = {"partition_config": AUTOTP["tensor_parallel"]["partition_config"]}
    engine, *_ = initialize(model=model, config=config(tensor_parallel=specs))
    return type(engine.module.embed).__name__, list(engine.module.embed.weight.shape)


def zero_init_over_the_gang() -> str:
    with deepspeed.zero.Init(config_dict_or_path=config(stage=3)):
        model = build()
    return error(model, config(stage=3) | AUTOTP)


def topology_free_init() -> list[list[float]]:
    """With `init` the table is the same whatever the engine."""
    section = {"tp_embed": {"init": {"name": "normal", "std": 0.1}}}
    losses = []
    for more, mpu in ((AUTOTP, None), ({}, groups), ({}, mpu_over([[0], [1], [2], [3]]))):
        engine, *_ = initialize(model=build(), config=config(0, **more, **section), mpu=mpu)
        with torch.no_grad():
            losses.append([float(engine(ids)) for ids in batches(0)])
    return losses


def error(model: nn.Module, ds_config: dict[str, Any], **options: Any) -> str:
    try:
        initialize(model=model, config=ds_config, **options)
    except (GangError, TypeError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def main(out: Path) -> None:
    import engines_gradients  # These import from here.
    import engines_meetings
    import engines_refusals

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    # First: DeepSpeed keeps the groups of the last engine for those that bring none.
    seen: dict[str, Any] = {"zero.Init alone": zero_init_alone()}
    seen["two engines"] = two_engines()
    seen["mpu checkpoint"] = mpu_checkpoint(out)
    DeepSpeedGang.from_groups(tp_size=2)
    seen["built before"] = built_before()
    seen["zero.Init"] = [zero_init(by_mpu) for by_mpu in (False, True)]
    seen["zero.Init over the gang"] = zero_init_over_the_gang()
    seen["fail alone at ZeRO 3"] = engines_meetings.fail_alone_at_zero_3()
    seen["meetings"] = engines_meetings.meetings()
    seen["sparse"] = engines_gradients.sparse()
    seen["sparse clipped unchecked"] = engines_gradients.sparse_clipped_unchecked()
    seen["sparse volumes"] = engines_gradients.sparse_volumes()
    seen["reuse_grad"] = engines_gradients.reuse_grad()
    seen["reuse_grad unchecked"] = engines_gradients.reuse_grad_unchecked()
    seen["init"] = topology_free_init()
    seen["refusals"] = engines_refusals.refusals(out)
    seen["tp_model_init"] = tp_model_init()
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
