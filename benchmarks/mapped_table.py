"""Compares a table in memory-mapped files with the same one in memory, over several ranks.

Ids follow Zipf's law. Frequent rows are spread over the table, as by a hash, or neighbors, as in
most vocabularies (`--spread 1`). The tables see the same ids, and take turns of ten steps (lookup,
gradient, optimizer). Prints medians of the slowest rank, their ratio, and the most resident memory
of a rank. For a table that does not fit into the memory, leave the other one out:

    torchrun --nproc-per-node 2 benchmarks/mapped_table.py --rows 4000000
    torchrun --nproc-per-node 2 benchmarks/mapped_table.py --rows 32000000 --only-mapped
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from tp_embed import MappedTable, ProcessGroupGang, RowWiseEmbedding, map_table
from tp_embed.nn import init
from tp_embed.optim import RowOptimizer, RowwiseAdagrad
from tp_embed.parameter.sharded import local

_TURN = 10  # Steps in a row: a prefetch runs during the next step of the same table.


class Ids:
    """Draws ids by Zipf's law, by the inverse of its continuous distribution."""

    def __init__(
        self, rows: int, count: int, exponent: float, seed: int, spread: int = 1_000_003
    ) -> None:
        self._rows, self._count, self._power, self._spread = rows, count, 1.0 - exponent, spread
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        uniform = torch.rand(self._count, generator=self._generator, dtype=torch.float64)
        most = float(self._rows) ** self._power
        ranks = (1 + uniform * (most - 1)) ** (1 / self._power)
        drawn: Tensor = (ranks.long().clamp(1, self._rows) - 1) * self._spread % self._rows
        return drawn


def status(key: str) -> int:
    """Returns a number of bytes from the status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10


class Way:
    """A table and its optimizer."""

    def __init__(self, gang: ProcessGroupGang, args: argparse.Namespace, is_mapped: bool) -> None:
        torch.manual_seed(0)
        self.embed = RowWiseEmbedding(
            gang,
            args.rows,
            args.dim,
            sparse=True,
            device="meta" if is_mapped else "cpu",
            init_fn=init.scaled if args.random else init.zeros,
        )
        self.mapped: MappedTable | None = None
        if is_mapped:
            self.mapped = map_table(self.embed, args.directory, resident=args.resident << 20)
        self.optimizer: RowOptimizer = RowwiseAdagrad([self.embed.weight], lr=0.05)
        self._ids = Ids(args.rows, args.ids, args.exponent, gang.rank, args.spread)
        self._next, self._prefetches = self._ids.draw(), is_mapped and args.prefetch
        self.seconds: list[float] = []
        self.distinct: list[int] = []

    def step(self, grad: Tensor) -> None:
        ids, self._next = self._next, self._ids.draw()
        self.distinct.append(len(ids.unique()))
        dist.barrier()
        start = time.perf_counter()
        if self._prefetches and self.mapped is not None:
            self.mapped.prefetch(self._next)
        self.embed(ids).backward(grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        spent = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        self.seconds.append(float(spent))


def run(gang: ProcessGroupGang, args: argparse.Namespace) -> None:
    base = status("VmRSS")
    started = time.perf_counter()
    ways = {"mapped": Way(gang, args, True)}
    made = time.perf_counter() - started
    if not args.only_mapped:
        ways["memory"] = Way(gang, args, False)
    generator = torch.Generator().manual_seed(gang.rank)
    grad, most = torch.randn(args.ids, args.dim, generator=generator), base
    for _ in range(0, args.warmup + args.steps, _TURN):
        for way in ways.values():
            for _ in range(_TURN):
                way.step(grad)
                most = max(most, status("VmRSS"))
    if gang.rank == 0:
        print(f"{args.rows} x {args.dim}: {args.rows * args.dim * 4 / 1e9:.1f} GB over {gang.size}")
        distinct = median(ways["mapped"].distinct)
        print(f"{args.ids} ids a rank, {distinct:.0f} distinct; made in {made:.0f} s")
        for name, way in ways.items():
            print(f"{name:8} {1000 * median(way.seconds[args.warmup :]):8.1f} ms a step")
    if not args.only_mapped:
        mapped, memory = (median(ways[n].seconds[args.warmup :]) for n in ("mapped", "memory"))
        is_same = torch.equal(*(local(way.embed.weight) for way in ways.values()))
        if gang.rank == 0:
            print(f"ratio {mapped / memory:.3f}; the same bits: {is_same}")
    print(
        f"rank {gang.rank}: {base >> 20} MiB resident before, {most >> 20} at most after a step, "
        f"{status('VmHWM') >> 20} at any time"
    )
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("build/mapped_table"))
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=160)
    parser.add_argument("--ids", type=int, default=1 << 14)
    parser.add_argument("--exponent", type=float, default=1.05)
    parser.add_argument(
        "--spread", type=int, default=1_000_003, help="1 for frequent rows that are neighbors"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--resident", type=int, default=512, help="in MiB")
    parser.add_argument("--prefetch", action="store_true", help="the ids of the next step")
    parser.add_argument("--only-mapped", action="store_true")
    parser.add_argument("--random", action="store_true", help="random initial values, not zeros")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gang = ProcessGroupGang(None, "cpu")
    try:
        run(gang, args)
    finally:
        dist.barrier()
        if gang.rank == 0:
            shutil.rmtree(args.directory)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
