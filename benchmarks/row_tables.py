"""Times steps of DeepSpeed engines whose table has an optimizer of its own.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/row_tables.py --markdown docs/optimizers.md

Each engine, at ZeRO 1, has one table: a lookup, its gradient and the optimizer are the step.
Compares tables of `"tp_embed": {"tables": ...}` with dense gradients and fused AdamW: of the same
sharded table, and of a `torch.nn.Embedding` on each data-parallel rank. Engines take turns with new
ids, drawn uniformly. Times are until all ranks are done, and CPU times are the mean of a rank;
ratios are medians over turns. Then grows the table. States are counted in the optimizers, with
DeepSpeed's fp32 copy of weights.

Two ranks need 19 GiB of memory in all, and more with `--compare whole`.
`--rows 20000 --grow 5000 20000` tries it out.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pages import insert
from tp_embed import RowWiseEmbedding, VocabShardedEmbedding
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from tp_embed.nn.init import constant

BEGIN, END = "<!-- The figures of benchmarks/row_tables.py: -->", "<!-- End of the tables. -->"


@dataclass(frozen=True)
class Way:
    """How a table is sharded, and trained: by fused AdamW unless it has an ``optimizer``.

    :param kind: the class of the table. All but `VocabShardedEmbedding` have ids of each rank.
    """

    label: str
    kind: type[nn.Module] = VocabShardedEmbedding
    optimizer: str | None = None


DENSE = Way("dense, fused AdamW")
WHOLE = Way("`nn.Embedding` on each rank, dense, fused AdamW", nn.Embedding)
OWN = [
    Way(f"`{name}`", optimizer=name) for name in ("rowwise_adagrad", "rowwise_adam", "lazy_adam")
]
WORLD = Way('`rowwise_adagrad`, `"world"`', RowWiseEmbedding, "rowwise_adagrad")
# The first is the one that others are compared with. All of a line are in memory at once.
COMPARISONS = {"sharded": [DENSE, *OWN, WORLD], "whole": [WHOLE, WORLD]}
GROWN = [OWN[0], WORLD]


class Model(nn.Module):
    def __init__(self, table: nn.Module, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.scale = nn.Parameter(torch.full((dim,), 1 / dim, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        total: Tensor = (self.table(ids) * self.scale).sum(dtype=torch.float32)
        return total


class Unit:
    """A Megatron-style unit: all ranks are tensor-parallel, or all are data-parallel."""

    def __init__(self, is_tensor_parallel: bool) -> None:
        alone = next(
            group
            for rank in range(dist.get_world_size())
            for group in [dist.new_group([rank])]
            if rank == dist.get_rank()
        )
        groups = {"model": dist.group.WORLD, "data": alone}
        if not is_tensor_parallel:
            groups = {"model": alone, "data": dist.group.WORLD}
        for kind, group in groups.items():
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            setattr(self, f"get_{kind}_parallel_group", partial(_same, group))
            setattr(self, f"get_{kind}_parallel_rank", partial(_same, rank))
            setattr(self, f"get_{kind}_parallel_world_size", partial(_same, size))


def _same(value: Any) -> Any:
    return value


class Engine:
    """An engine of one table, and the ids of its steps."""

    def __init__(self, way: Way, rows: int, args: argparse.Namespace, dtype: torch.dtype) -> None:
        self.rows, self.count, self.size = rows, args.ids, rows * args.dim
        own_ids = way.kind is not VocabShardedEmbedding
        self._generator = torch.Generator().manual_seed(dist.get_rank() if own_ids else 0)
        unit = Unit(is_tensor_parallel=not own_ids)
        model = Model(make_table(way, unit, rows, args.dim, dtype), args.dim, dtype)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 1e-3, "torch_adam": True, "fused": True},
            },
        }
        if way.optimizer:
            config["tp_embed"] = {"tables": {"table": {"optimizer": way.optimizer}}}
        make = deepspeed.initialize if way is WHOLE else initialize
        self.engine = make(model=model, config=config, mpu=unit)[0]

    def step(self) -> tuple[float, float]:
        """Returns the seconds of a step until all ranks are done, and a rank's CPU seconds."""
        ids = torch.randint(self.rows, (self.count,), generator=self._generator)
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        self.engine.backward(self.engine(ids))
        self.engine.step()
        cpu = torch.tensor((time.process_time() - start_cpu) / dist.get_world_size())
        dist.barrier()
        seconds = time.perf_counter() - start
        dist.all_reduce(cpu)
        return seconds, cpu.item()

    def states(self) -> list[Tensor]:
        """Returns the states of the table's optimizer on this rank, once there is a step."""
        own = getattr(self.engine, "tp_embed_tables", None)
        if own is not None:
            (optimizer,), copies = own.optimizers.values(), []
        else:
            optimizer = self.engine.optimizer.optimizer
            copies = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        found = [value for state in optimizer.state.values() for value in state.values()]
        return [value for value in found if isinstance(value, Tensor) and value.ndim] + copies

    def state_bytes(self) -> float:
        """Returns the bytes of states of all ranks, for a parameter of the table."""
        total = torch.tensor(sum(state.nbytes for state in self.states()))
        dist.all_reduce(total)
        return float(total.item() / self.size)


def make_table(way: Way, unit: Unit, rows: int, dim: int, dtype: torch.dtype) -> nn.Module:
    if way.kind is nn.Embedding:
        table: nn.Embedding = nn.utils.skip_init(nn.Embedding, rows, dim, dtype=dtype)
        nn.init.ones_(table.weight)
        return table
    options: dict[str, Any] = {"init_fn": partial(constant, value=1.0), "dtype": dtype}
    if way.kind is RowWiseEmbedding:
        world = DeepSpeedGang.from_world()
        return RowWiseEmbedding(world, rows, dim, grad_reduction="mean", **options)
    return VocabShardedEmbedding(DeepSpeedGang.from_mpu(unit), rows, dim, **options)


def take_turns(engines: Sequence[Engine], rounds: int) -> list[list[tuple[float, float]]]:
    """Returns the seconds of each engine's steps."""
    for engine in engines:
        engine.step()
        for state in engine.states():
            state.add_(0)  # The first write to a page of zeros costs more.
    found: list[list[tuple[float, float]]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, times in zip(engines, found, strict=True):
            times.append(engine.step())
    return found


def line(
    label: str, times: Sequence[tuple[float, float]], first: Sequence[tuple[float, float]]
) -> str:
    cells = []
    for index in (0, 1):
        ms = [1000 * each[index] for each in times]
        ratio = median(a[index] / b[index] for a, b in zip(times, first, strict=True))
        cells += [f"{median(ms):.1f}", f"{min(ms):.1f} to {max(ms):.1f}", f"{ratio:.3f}"]
    return f"| {label} | {' | '.join(cells)} |"


_CELLS = "ms | from, to | ratio | CPU ms | from, to | ratio |"


def compare(name: str, args: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    engines = [Engine(way, args.rows, args, dtype) for way in COMPARISONS[name]]
    found = take_turns(engines, args.rounds)
    lines = [f"| | {_CELLS} state, bytes a parameter |", "|---" * 8 + "|"]
    for way, engine, times in zip(COMPARISONS[name], engines, found, strict=True):
        lines.append(f"{line(way.label, times, found[0])} {engine.state_bytes():.3f} |")
    for engine in engines:
        engine.engine.destroy()
    return lines


def grow(way: Way, args: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    engines = [Engine(way, rows, args, dtype) for rows in args.grow]
    found = take_turns(engines, 3 * args.rounds)
    for engine in engines:
        engine.engine.destroy()
    return [
        line(f"{way.label}, {engine.rows:,} rows", times, found[0])
        for engine, times in zip(engines, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=160)
    parser.add_argument("--ids", type=int, default=1 << 14)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--compare", nargs="*", default=["sharded"], choices=COMPARISONS)
    parser.add_argument("--grow", type=int, nargs="*", default=[500_000, 2_000_000, 8_000_000])
    parser.add_argument("--markdown", type=Path, help="the page to write the figures into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    deepspeed.init_distributed()
    parts = []
    for dtype in args.dtypes:
        heading = f"P = {dist.get_world_size()}, {args.dim} columns, {args.ids:,} ids, {dtype}:"
        for name in args.compare:
            lines = compare(name, args, getattr(torch, dtype))
            parts.append("\n".join([f"{args.rows:,} rows, {heading}", "", *lines]))
            gc.collect()
    if args.grow:
        lines = [f"| | {_CELLS}", "|---" * 7 + "|"]
        for way in GROWN:
            lines += grow(way, args, torch.float32)
            gc.collect()
        parts.append("\n".join(["The same for tables of other sizes, in float32:", "", *lines]))
    if dist.get_rank() == 0:
        text = "\n\n".join(parts)
        print(text)
        if args.markdown is not None:
            insert(args.markdown, BEGIN, END, text)


if __name__ == "__main__":
    main()
