"""Compares the predictions of `tp-embed plan` with engines whose table is sharded over all ranks,
or has an optimizer of its own.

    deepspeed --num_gpus 4 --no_local_rank benchmarks/plan_tables.py

For each case, trains a table on an engine (TP 2 x DP 2), and prints the bytes that a rank holds
after a backward, and those it puts into collectives of the table.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from plan import config, plan, storages, tensors
from tp_embed.integrations.deepspeed import initialize
from tp_embed.plan import Cost, Setup, Strategy

RANKS: dict[str, Any] = {
    "head": False,
    "tp_size": 2,
    "dp_size": 2,
    "tokens": 608,
    "unique_share": 1.0,  # Also of the tokens of all ranks and micro-batches together.
    "device": "cpu",
}
EVEN: dict[str, Any] = {"vocab_size": 4800, "embed_dim": 64, **RANKS}
UNEVEN: dict[str, Any] = {**EVEN, "embed_dim": 63}
FP32: dict[str, Any] = {**EVEN, "dtype": "fp32"}
ADAGRAD: dict[str, Any] = {"table_optimizer": "rowwise_adagrad"}
ADAM: dict[str, Any] = {"table_optimizer": "rowwise_adam"}
LAZY: dict[str, Any] = {"table_optimizer": "lazy_adam"}
TWO: dict[str, Any] = {"accumulation_steps": 2}
CASES: list[tuple[Setup, Strategy]] = [
    (Setup(**FP32, **ADAGRAD, zero_stage=0), "vocab"),
    (Setup(**EVEN, **ADAM, **TWO, zero_stage=1, table_decay=True), "embed"),
    (Setup(**UNEVEN, **ADAGRAD, zero_stage=3), "embed"),
    (Setup(**FP32, **LAZY, **TWO, zero_stage=2), "vocab"),
    (Setup(**EVEN, **LAZY, zero_stage=3, table_decay=True), "vocab"),
    (Setup(**EVEN, **ADAGRAD, **TWO, zero_stage=3, placement="cyclic"), "world"),
    (Setup(**FP32, **ADAM, zero_stage=1, table_decay=True), "world"),
    (Setup(**EVEN, **LAZY, **TWO, zero_stage=2), "world"),
    (Setup(**FP32, **TWO, zero_stage=0, placement="cyclic"), "world"),
    (Setup(**FP32, zero_stage=0, optimizer="sgd", sparse=True), "world"),
]


class Model(nn.Module):
    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.table = nn.Embedding(setup.vocab_size, setup.embed_dim, sparse=setup.sparse)
        self.scale = nn.Parameter(torch.ones(setup.embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        total: Tensor = (self.table(ids) * self.scale).sum()
        return total


def ids_of(setup: Setup, micro_batch: int) -> Tensor:
    """Returns ids that no other rank or micro-batch has, as many for each shard."""
    shards = 4
    number = dist.get_rank() // setup.tp_size * setup.accumulation_steps + micro_batch
    each = setup.tokens // shards
    token = torch.arange(setup.tokens)
    return token % shards * (setup.vocab_size // shards) + token // shards + number * each


def unit(tp_size: int) -> Any:
    """Returns a Megatron-style unit of tensor-parallel neighbours."""
    ranks = torch.arange(dist.get_world_size()).view(-1, tp_size)
    found: dict[str, Any] = {}
    for kind, groups in (("model", ranks), ("data", ranks.T)):
        for members in groups.tolist():
            group = dist.new_group(members)
            if dist.get_rank() in members:
                at, size = members.index(dist.get_rank()), len(members)
                found[f"get_{kind}_parallel_group"] = lambda group=group: group
                found[f"get_{kind}_parallel_rank"] = lambda at=at: at
                found[f"get_{kind}_parallel_world_size"] = lambda size=size: size
    return SimpleNamespace(**found)


def measure(setup: Setup, strategy: Strategy, mpu: Any) -> dict[str, Any]:
    """Measures the bytes a rank holds, and those it puts into collectives of the table."""
    known = storages(tensors())
    torch.manual_seed(0)
    ds_config = config(setup, strategy)
    del ds_config["tensor_parallel"]
    ds_config["tp_embed"]["placement"] = setup.placement
    if setup.table_optimizer:
        decay = 0.1 if setup.table_decay else 0.0
        own = {"optimizer": setup.table_optimizer, "weight_decay": decay}
        ds_config["tp_embed"]["tables"] = {"table": own}
    engine, *_ = initialize(model=Model(setup), config=ds_config, mpu=mpu)
    sent: dict[str, int] = defaultdict(int)
    own_tables = getattr(engine, "tp_embed_tables", None)
    gangs = [engine.module.table.gang, *([own_tables.replicas] if own_tables else [])]
    handles = [gang.register_collective_hook(counting(sent)) for gang in gangs]
    held: list[int] = []
    for _ in range(2):  # The first step creates the states.
        sent.clear()
        for i in range(setup.accumulation_steps):
            engine.backward(engine(ids_of(setup, i)))
            now = storages(tensors())
            held.append(sum(n for address, n in now.items() if address not in known))
            engine.step()
    for handle in handles:
        handle.remove()
    engine.destroy()
    return {"held": max(held), "sent": dict(sent)}


def counting(sent: dict[str, int]) -> Any:
    def count(operation: str, tensors: Sequence[Tensor]) -> Any:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if nbytes > 4:  # Else a norm.
            sent[operation] += nbytes
        return nullcontext()

    return count


def payloads(planned: Cost) -> dict[str, int]:
    """Returns the planned bytes that a rank puts into collectives."""
    found: dict[str, int] = defaultdict(int)
    for transfer in planned.transfers:
        found[transfer.operation] += transfer.count * transfer.payload
    return dict(found)


def name(setup: Setup, strategy: Strategy) -> str:
    steps = setup.accumulation_steps
    parts = [f"ZeRO {setup.zero_stage}", strategy, setup.dtype]
    parts += [setup.table_optimizer or setup.optimizer]
    parts += ["weight decay"] if setup.table_decay else []
    parts += ["cyclic"] if setup.placement == "cyclic" else []
    parts += ["uneven"] if setup.embed_dim % 2 else []
    return ", ".join(parts + ([f"{steps} micro-batches"] if steps > 1 else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="DIR", help="write the results, one file per rank")
    directory = parser.parse_args().json
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    mpu = unit(2)
    found, rank = [measure(*case, mpu) for case in CASES], dist.get_rank()
    if directory:
        with open(f"{directory}/{rank}.json", "w") as file:
            json.dump(found, file)
    if rank == 0:
        print("bytes of a rank, planned / measured")
        for case, row in zip(CASES, found, strict=True):
            planned = plan(*case)
            sent = sum(payloads(planned).values())
            print(
                f"  {name(*case)}: held {planned.states} / {row['held']}, "
                f"put into collectives {sent} / {sum(row['sent'].values())}"
            )


if __name__ == "__main__":
    main()
