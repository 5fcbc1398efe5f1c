"""Measures the CPU time of a training step of one table: lookup, gradient, and optimizer.

Compares dense gradients and torch's fused AdamW with the optimizers of `tp_embed.optim` and
torch's `SparseAdam` on sparse gradients, in turns, and prints medians and ratios. Then grows the
table. All ways share one table; each draws its own ids in each round.

    python benchmarks/row_optimizers.py --rows 2000000 --dim 160 --ids 16384
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.optim import AdamW, Optimizer, SparseAdam

from tp_embed import StandardEmbedding
from tp_embed.optim import LazyAdam, RowwiseAdagrad, RowwiseAdam

DENSE = "dense, fused AdamW"
WAYS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    DENSE: lambda params: AdamW(params, fused=True),
    "RowwiseAdagrad": RowwiseAdagrad,
    "RowwiseAdagrad, weight decay": lambda params: RowwiseAdagrad(params, weight_decay=0.1),
    "RowwiseAdam": RowwiseAdam,
    "LazyAdam": LazyAdam,
    "torch SparseAdam": SparseAdam,
}


class Table:
    """A table, its optimizers, and the ids of each step."""

    def __init__(self, rows: int, dim: int, ids: int, dtype: torch.dtype) -> None:
        self.rows, self.ids, self.generator = rows, ids, torch.Generator().manual_seed(0)
        self.embed = StandardEmbedding(rows, dim, sparse=True, dtype=dtype, device="meta")
        self.embed.to_empty(device="cpu")
        nn.init.ones_(self.embed.weight)  # So that all of its memory is there.
        self.grad = torch.randn(ids, dim, dtype=dtype)
        self.optimizers: dict[str, Optimizer] = {}

    def draw(self) -> Tensor:
        return torch.randint(self.rows, (self.ids,), generator=self.generator)

    def step(self, way: str) -> tuple[float, float]:
        """Returns the CPU seconds of a step, and of the optimizer in it."""
        weight, ids = self.embed.weight, self.draw()
        optimizer = self.optimizers.get(way)
        if optimizer is None:
            optimizer = self.optimizers[way] = WAYS[way]([weight])
        start = time.process_time()
        output = embedding(ids, weight) if way == DENSE else self.embed(ids)
        output.backward(self.grad)
        before = time.process_time()
        optimizer.step()
        optimizer.zero_grad()
        end = time.process_time()
        return end - start, end - before

    def touch_states(self) -> None:
        """Writes to all states once: the first write to a page of zeros costs more."""
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor) and value.numel() > 1:
                        value.add_(0)


def compare(table: Table, rounds: int, ways: list[str]) -> None:
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for way in ways:
        table.step(way)
    table.touch_states()
    for _ in range(rounds):
        for way in ways:
            seconds[way].append(table.step(way))
    first = median(step for step, _ in seconds[ways[0]])
    for way in ways:
        step, update = (median(each) for each in zip(*seconds[way], strict=True))
        print(f"{way:30} {1000 * step:9.1f} ms {1000 * update:9.1f} ms {step / first:8.4f}")


def grow(tables: list[Table], rounds: int, way: str) -> None:
    seconds: list[list[float]] = [[] for _ in tables]
    for table in tables:
        table.step(way)
        table.touch_states()
    for _ in range(rounds):
        for table, found in zip(tables, seconds, strict=True):
            found.append(table.step(way)[0])
    medians = [median(found) for found in seconds]
    for table, step in zip(tables, medians, strict=True):
        print(f"{way:30} {table.rows:9} rows {1000 * step:9.1f} ms {step / medians[0]:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=160)
    parser.add_argument("--ids", type=int, default=1 << 14)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help=f"of {list(WAYS)}")
    parser.add_argument("--grow", type=int, nargs="*", default=[500_000, 2_000_000, 8_000_000])
    parser.add_argument("--grow-ways", nargs="*", default=["RowwiseAdagrad"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype: torch.dtype = getattr(torch, args.dtype)
    if args.ways:
        print(f"{args.rows} x {args.dim}, {args.ids} ids: step, optimizer, ratio of steps")
        compare(Table(args.rows, args.dim, args.ids, dtype), args.rounds, args.ways)
    for way in args.grow_ways if args.grow else []:
        tables = [Table(rows, args.dim, args.ids, dtype) for rows in args.grow]
        grow(tables, 3 * args.rounds, way)


if __name__ == "__main__":
    main()
