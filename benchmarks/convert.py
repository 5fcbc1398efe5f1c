"""Times the conversion of a large table next to `cp` of the same bytes, and measures its memory.

Each conversion and each copy ends with the bytes on disk (`sync`), and starts right after the last
output was removed; their order alternates. Memory is the peak of the process above its size after
imports and a conversion of a small checkpoint.

All memory is touched before measuring, which can take a minute: see `machine.py`.

    python benchmarks/convert.py                # 262144 x 4096 in bf16, 2 GiB
    python benchmarks/convert.py --rows 524288 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from machine import forget_peak, peak, touch_memory
from tp_embed.checkpoint import Request, convert

NAME = "model.embed_tokens.weight"

# Label -> source and request of a conversion.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hf -> hf": ("hf", {"to": "hf"}),
    "hf -> tp-embed, vocab, TP 4": ("hf", {"to": "tp-embed", "tp_size": 4, "dim": "vocab"}),
    "hf -> tp-embed, embed, TP 4": ("hf", {"to": "tp-embed", "tp_size": 4, "dim": "embed"}),
    "tp-embed, TP 2 -> 4, vocab": ("vocab", {"to": "tp-embed", "tp_size": 4}),
    "tp-embed, TP 2 -> 4, vocab -> embed": (
        "vocab",
        {"to": "tp-embed", "tp_size": 4, "dim": "embed"},
    ),
    "tp-embed, TP 2 -> hf, embed": ("embed", {"to": "hf"}),
    "hf -> pt": ("hf", {"to": "pt"}),
    "hf -> dcp": ("hf", {"to": "dcp"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    args = parser.parse_args()
    touch_memory()
    with TemporaryDirectory(dir=args.directory, prefix="convert-") as scratch:
        root = Path(scratch)
        sources = make_sources(root, args.rows, args.columns)
        small = make_sources(root / "small", 64, 64)
        nbytes = args.rows * args.columns * 2
        print(f"{args.rows} x {args.columns} bf16, {nbytes / 2**30:.2f} GiB, {args.rounds} rounds")
        print("| conversion | s, median | min | max | cp, s | ratio | MiB above the start |")
        print("|---|---|---|---|---|---|---|")
        for label, (source, request) in CASES.items():
            ours, copies, memory = [], [], 0.0
            for number in range(args.rounds):
                seconds, copied, grown = take_turns(
                    small[source], sources[source], root / "out.pt", Request(**request), number % 2
                )
                ours.append(seconds)
                copies.append(copied)
                memory = max(memory, grown)
            median, copy = statistics.median(ours), statistics.median(copies)
            print(
                f"| {label} | {median:.2f} | {min(ours):.2f} | {max(ours):.2f} | {copy:.2f} "
                f"| {median / copy:.2f} | {memory:.0f} |",
                flush=True,
            )


def make_sources(root: Path, rows: int, columns: int) -> dict[str, Path]:
    """Writes the same table as one file, and cut over two ranks along either dimension."""
    root.mkdir(exist_ok=True)
    table = torch.empty(rows, columns, dtype=torch.bfloat16)
    for part in table.split(16_384):
        part.normal_()
    torch.save({NAME: table}, root / "table.pt")
    del table
    sources = {"hf": root / "hf", "vocab": root / "vocab", "embed": root / "embed"}
    convert(root / "table.pt", sources["hf"], Request(to="hf", max_shard_size=2**40))
    (root / "table.pt").unlink()
    for dim in ("vocab", "embed"):
        convert(sources["hf"], sources[dim], Request(to="tp-embed", tp_size=2, dim=dim))
    return sources


def take_turns(
    small: Path, source: Path, output: Path, request: Request, copy_first: int
) -> tuple[float, float, float]:
    """Returns the seconds of a conversion and of a copy, and the growth in MiB of the conversion's
    process, which is new."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=measure, args=(sender, small, source, output, request, copy_first)
    )
    process.start()
    sender.close()
    found: tuple[float, float, float] = receiver.recv()
    process.join()
    return found


def measure(
    sender: Connection, small: Path, source: Path, output: Path, request: Request, copy_first: int
) -> None:
    torch.set_num_threads(1)
    convert(small, output.with_name("small-out.pt"), request, overwrite=True)
    copied = copy_seconds(source, output) if copy_first else 0.0
    forget_peak()
    before = peak()
    seconds = timed(lambda: convert(source, output, request), output)
    grown = (peak() - before) / 1024
    copied = copied or copy_seconds(source, output)
    sender.send((seconds, copied, grown))


def copy_seconds(source: Path, output: Path) -> float:
    def copy() -> None:
        subprocess.run(["cp", "-r", source, output], check=True)
        subprocess.run(["sync"], check=True)

    return timed(copy, output)


def timed(write: Callable[[], object], output: Path) -> float:
    """Returns the seconds that writing ``output`` takes, and removes it."""
    os.sync()
    start = time.perf_counter()
    write()
    seconds = time.perf_counter() - start
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return seconds


if __name__ == "__main__":
    main()
