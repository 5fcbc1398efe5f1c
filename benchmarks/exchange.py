"""Times forward and backward of sharded embeddings, ours and other libraries', in turns.

    python benchmarks/exchange.py                        # P = 2, V = 32k, E = 4096, N = 8192
    python benchmarks/exchange.py --ranks 2 4 --dim 1024 --ids zipf uniform --dtype bf16
    python benchmarks/exchange.py --ways 'Mega*' 'tp_embed embed, *'     # all kinds of these
    python benchmarks/exchange.py --quick                # small sizes, to see that it runs
    python benchmarks/exchange.py --grid --minutes 8 --markdown docs/performance.md

Starts its own ranks, with one thread each, over gloo. All layers of a case share the group and the
shards. First, each layer is compared with `torch.nn.Embedding`, the output bit by bit and the
gradient against fp64, and its sent bytes are counted. Then all layers take turns, round by round.
Times are the slowest rank's. "Forward" saves tensors for a backward; "with backward" times both,
and freeing the gradient. Every rank has all ids: `token_ids.py` draws them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from exchange_report import Report
from initialisation import measure_initialisation
from machine import touch_memory
from token_ids import DISTRIBUTIONS
from tp_embed import ProcessGroupGang
from turns import DTYPES, Case, measure
from ways import DEFAULT, GROWTH, WAYS

# The last has eight times as many rows as the first.
VOCABS = (32_768, 65_536, 131_072, 262_144)


def select(patterns: Sequence[str], output: str = "*") -> tuple[str, ...]:
    """Returns the names of ways that match a pattern."""
    return tuple(
        name
        for name, way in WAYS.items()
        if any(fnmatch(name, pattern) for pattern in patterns) and fnmatch(way.output, output)
    )


def grid() -> list[Case]:
    """Returns the cases of the report, the most important ones first."""
    everything = select(DEFAULT)
    # What takes longest with large tables, and says least: DTensor's sequence outputs.
    sequence = select(("Megatron*", "tp_embed *, auto, *"), "sequence*")
    replicated = select([name for name in DEFAULT if "dedup" not in name], "replicated")
    large = Case(2, 32_768, 4096, 8192, "fp32", "zipf", replicated + sequence, seconds=35)
    small = replace(large, ranks=4, dim=1024, tokens=4096, ways=everything, seconds=15)
    point = replace(large, dim=1024, tokens=4096, ways=select(GROWTH), seconds=4, rounds=11)
    return [
        large,
        small,
        replace(large, ids="uniform", ways=replicated, seconds=30),
        replace(small, ids="uniform", ways=replicated, seconds=8),
        replace(large, dtype="bf16", seconds=25),
        replace(small, dtype="bf16", seconds=8),
        *(replace(point, vocab=vocab, axis="vocab") for vocab in VOCABS),
        replace(large, vocab=131_072, dim=1024, ways=replicated, seconds=20),
        replace(small, vocab=131_072, ways=replicated, seconds=20),
        replace(large, batch=4, ways=sequence, seconds=8),
        replace(small, batch=4, ways=sequence, seconds=4),
        replace(small, ids="zipf-sorted", ways=replicated, seconds=6),
        *(replace(point, tokens=tokens, axis="tokens") for tokens in (1024, 2048, 8192, 16_384)),
        *(replace(point, ranks=ranks, axis="ranks") for ranks in (1, 4)),
    ]


def work(
    rank: int, size: int, store: str, cases: list[Case], deadline: float, output: Path
) -> None:
    """Runs one rank. Ranks that a case does not use wait for the next case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # From the peers' code.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    gangs = {}
    for count in sorted({case.ranks for case in cases}):
        group = dist.new_group(range(count))
        if rank < count:
            gangs[count] = ProcessGroupGang(group, "cpu")
    results = []
    for number, case in enumerate(cases, 1):
        started = time.perf_counter()
        late = torch.tensor(number > 1 and time.time() > deadline)
        dist.broadcast(late, 0)
        if late:
            if rank == 0:
                print(f"{number}/{len(cases)}: {case}: no time left", file=sys.stderr)
            continue
        if rank < case.ranks:
            results.append(measure(case, gangs[case.ranks]))
        dist.barrier()
        if rank == 0:
            seconds = time.perf_counter() - started
            rounds = results[-1]["measured_rounds"]
            print(
                f"{number}/{len(cases)}: {case}: {rounds} rounds, {seconds:.0f} s", file=sys.stderr
            )
    if rank == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


def run(cases: list[Case], seconds: float = float("inf")) -> list[dict[str, Any]]:
    """Returns the results of each case that starts within ``seconds``."""
    deadline = time.time() + seconds
    size = max(case.ranks for case in cases)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "results.json"
        spawn(work, (size, f"{scratch}/store", cases, deadline, output), nprocs=size)
        found: list[dict[str, Any]] = json.loads(output.read_text())
    return found


def machine() -> str:
    cpus = Path("/proc/cpuinfo").read_text().split("model name\t: ")
    name = cpus[1].partition("\n")[0] if len(cpus) > 1 else platform.processor()
    return f"{os.cpu_count()} cores of {name}, torch {torch.__version__}, gloo"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"nargs": "+", "type": int}
    parser.add_argument("--ranks", "-P", default=[2], **several)
    parser.add_argument("--vocab", "-V", default=[32_768], **several)
    parser.add_argument("--dim", "-E", default=[4096], **several)
    parser.add_argument("--tokens", "-N", default=[8192], **several)
    parser.add_argument("--dtype", default=["fp32"], nargs="+", choices=DTYPES)
    parser.add_argument("--ids", default=["zipf"], nargs="+", choices=DISTRIBUTIONS)
    parser.add_argument("--batch", type=int, default=1, help="number of sequences")
    parser.add_argument("--ways", nargs="+", default=DEFAULT, help="patterns of names")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds of a case")
    parser.add_argument("--seconds", type=float, default=30.0, help="time per case, about")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no new case after this time"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--grid", action="store_true", help="all cases of the report")
    parser.add_argument("--markdown", type=Path, help="the page to write the grid's tables to")
    parser.add_argument("--json", type=Path, help="write every time of every round to this file")
    parser.add_argument("--again", type=Path, help="only report from a file of --json")
    args = parser.parse_args(arguments)
    if not select(args.ways):
        parser.error(f"--ways must match some of {', '.join(WAYS)}, but is {args.ways} instead.")

    if args.again:
        results = json.loads(args.again.read_text())
    else:
        sizes = args.ranks, args.vocab, args.dim, args.tokens, args.dtype, args.ids
        table, rounds = (131_072, 1024, 4), 3
        if args.quick:
            sizes = args.ranks, [4096], [256], [1024], args.dtype, args.ids
            table, args.seconds = (8192, 256, 4), 2.0
        cases = [
            Case(*size, select(args.ways), args.batch, args.seconds, args.rounds)
            for size in itertools.product(*sizes)
        ]
        started = time.perf_counter()
        if not args.quick:
            touch_memory()
        made = measure_initialisation(*table, rounds)
        left = 60 * args.minutes - (time.perf_counter() - started)
        found = run(grid() if args.grid else cases, left)
        results = {"machine": machine(), "initialisation": made, "cases": found}
        print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    report = Report(results)
    if args.markdown:
        report.write(args.markdown)
        print(report.goals())
    else:
        print(report.text() if args.grid or args.again else report.tables())


if __name__ == "__main__":
    main()
