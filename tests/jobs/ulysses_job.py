"""Run on four ranks for test_ulysses.py: trains a model whose positions are split over sequence
groups, with tables that are cut over tensor-parallel groups, and saves the results by rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tp_embed import ProcessGroupGang
from tp_embed.integrations.deepspeed import DeepSpeedGang, averages_over_sequence, initialize
from tp_embed.nn.sequence import mean_over_sequence

VOCAB, DIM, HEADS, LENGTH, STEPS, LR, CLIP = 37, 16, 4, 8, 3, 0.05, 3.0

CASES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero": {"stage": 0}},
    "ZeRO 1": {"zero": {"stage": 1}},
    "ZeRO 2, columns": {"zero": {"stage": 2}, "strategy": "embed"},
    "ZeRO 1, untied": {"zero": {"stage": 1}, "tied": False},
    "ZeRO 3": {"zero": {"stage": 3}},
    "ZeRO 3, all-reduce": {"zero": {"stage": 3, "reduce_scatter": False}},
    "ZeRO 3, untied columns": {"zero": {"stage": 3}, "strategy": "embed", "tied": False},
}


class Groups:
    """The ``mpu`` of tensor-parallel groups of neighbours, and of sequence groups across them."""

    def __init__(self) -> None:
        self.tensor = self._own([[0, 1], [2, 3]])
        self.sequence = self._own([[0, 2], [1, 3]])
        self.data = self._own([[0], [1], [2], [3]])

    @staticmethod
    def _own(groups: list[list[int]]) -> Any:
        found = [(ranks, dist.new_group(ranks)) for ranks in groups]
        return next(group for ranks, group in found if dist.get_rank() in ranks)

    def __getattr__(self, name: str) -> Any:
        kinds = {
            "tensor_model": self.tensor,
            "model": self.tensor,
            "sequence": self.sequence,
            "sequence_data": self.sequence,
            "data": self.data,
        }
        kind, _, what = name.removeprefix("get_").rpartition("_parallel_")
        if not name.startswith("get_") or kind not in kinds:
            raise AttributeError(name)
        group = kinds[kind]
        found = {"group": group, "rank": dist.get_rank(group)}
        return lambda: {**found, "world_size": dist.get_world_size(group)}[what]


class Model(nn.Module):
    """Takes the ids of this rank's positions."""

    def __init__(
        self, tied: bool, sequence: ProcessGroupGang | None = None, averaged: bool = False
    ) -> None:
        super().__init__()
        self.sequence, self.averaged = sequence, averaged
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.head: Any = nn.Linear(DIM, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.attend: Any = attention
        if sequence is not None:
            self.attend = DistributedAttention(attention, sequence.as_process_group())

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)  # (positions, batch, E)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        batch_dim = () if self.sequence is None else (1,)
        attended: Tensor = self.attend(q, k, v, *batch_dim)
        output: Tensor = x + self.out(attended.flatten(2)).tanh()
        return output

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss over all positions."""
        hidden = self.hidden(ids)
        if hasattr(self.head, "loss"):
            total = self.head.loss(hidden, labels, reduction="sum")
        else:  # A whole table.
            logits = self.head(hidden)
            total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count = (labels != -100).sum()
        if self.sequence is None:
            mean: Tensor = total / count
            return mean
        return mean_over_sequence(total, count, self.sequence, averaged=self.averaged)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of all positions, (positions, batch, heads, width)."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Ids and labels, (positions, batch). The last positions have few labels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (STEPS, LENGTH + 1, 2), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, -3:] = -100
    return list(zip(tokens[:, :-1], labels, strict=True))


def train_alone(tied: bool) -> list[float]:
    model = Model(tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for ids, labels in batches():
        optimizer.zero_grad()
        loss = model(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def config(zero: dict[str, Any], strategy: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "tp_embed": {"strategy": strategy},
    }


def train(
    mpu: Any, zero: dict[str, Any], strategy: str = "vocab", tied: bool = True
) -> list[float]:
    gang = ProcessGroupGang(mpu.get_sequence_parallel_group(), "cpu")
    ds_config = config(zero, strategy)
    group = mpu.get_sequence_data_parallel_group()
    with deepspeed.zero.Init(
        config_dict_or_path=ds_config, data_parallel_group=group, enabled=zero["stage"] == 3
    ):
        model = Model(tied, gang, averages_over_sequence(ds_config))
    engine, *_ = initialize(model=model, config=ds_config, mpu=mpu)
    losses = []
    for batch in batches():
        loss = engine(*(whole.chunk(gang.size)[gang.rank] for whole in batch))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def refusal(run: Callable[[], object]) -> str:
    try:
        run()
    except ValueError as e:
        return str(e)
    raise AssertionError("It is not refused.")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    mpu = Groups()
    seen: dict[str, Any] = {name: train(mpu, **case) for name, case in CASES.items()}
    ds_config = config({"stage": 3}, "vocab")
    seen["outside of zero.Init"] = refusal(
        lambda: initialize(model=Model(tied=True), config=ds_config, mpu=mpu)
    )
    parallel_state_sp.initialize_sequence_parallel(4)
    seen["one group"] = refusal(lambda: DeepSpeedGang.from_mpu(parallel_state_sp))
    for stage in (1, 3):
        seen[f"whole, ZeRO {stage}"] = train(parallel_state_sp, {"stage": stage})
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
