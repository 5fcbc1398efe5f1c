"""Times the steps of a lookup on one device against its memory bandwidth, for `gpu.py`.

A custom kernel might speed up steps below 80% of the bandwidth. Sorting is not bandwidth-bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from token_ids import draw
from tp_embed import FakeGang, ShardedEmbedding
from tp_embed.lookup.distinct import find_distinct
from tp_embed.lookup.gradient import sum_all, sum_by_id

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Copied to measure the bandwidth. Larger than caches.
_COPIED_BYTES = 1 << 28


@dataclass(frozen=True)
class Step:
    """A timed step, and the bytes it must at least read and write."""

    name: str
    run: Callable[[], object]
    nbytes: int


@dataclass(frozen=True)
class Timing:
    name: str
    seconds: float
    nbytes: int

    @property
    def bandwidth(self) -> float:
        return self.nbytes / self.seconds


def measure(step: Step, seconds: float) -> Timing:
    """Returns the median time. The timer waits for the device."""
    timer = Timer("run()", globals={"run": step.run})
    median: float = timer.blocked_autorange(min_run_time=seconds).median
    return Timing(step.name, median, step.nbytes)


def copy_step(device: str, nbytes: int = _COPIED_BYTES) -> Step:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Step("copy of memory", lambda: target.copy_(source), 2 * nbytes)


def steps(
    device: str, vocab: int, dim: int, tokens: int, size: int, dtype: torch.dtype, distribution: str
) -> list[Step]:
    """Returns the steps of one of ``size`` ranks, with tables cut by columns."""
    width = dim // size
    weight = torch.randn(vocab, width, device=device, dtype=dtype)
    ids = draw(distribution, vocab, (tokens,)).to(device)
    distinct = find_distinct(ids)
    inverse, count = distinct.inverse(), len(distinct.ids)
    received = torch.randn(size * count, width, device=device, dtype=dtype)
    plain = torch.randn(size, tokens, width, device=device, dtype=dtype)
    index = (inverse[:, None] + torch.arange(size, device=device) * count).flatten()
    grad = torch.randn(tokens, dim, device=device, dtype=dtype)
    own = grad[:, :width]
    item, per_id = weight.element_size(), ids.element_size()
    row, block = dim * item, width * item
    table = vocab * block
    steps = [
        Step(
            "lookup",
            lambda: weight.index_select(0, ids),
            count * block + tokens * (block + per_id),
        ),
        Step("find distinct ids", lambda: find_distinct(ids), 2 * (tokens + count) * per_id),
        Step("inverse", distinct.inverse, (2 * tokens + count) * per_id),
        Step(
            "un-duplicate, and put columns together",
            lambda: received.index_select(0, index).view(tokens, dim),
            count * row + tokens * (row + size * per_id),
        ),
        Step(
            "put columns together",
            lambda: plain.transpose(0, 1).clone(memory_format=torch.contiguous_format),
            2 * tokens * row,
        ),
        Step(
            "gradient, of distinct rows",
            lambda: sum_by_id(grad, distinct, range(width)),
            tokens * (block + per_id) + count * block,
        ),
    ]
    if torch.device(device).type != "cpu":
        steps.append(
            Step(
                "gradient, of the table, nothing asked",
                lambda: sum_all(own, ids, vocab),
                tokens * (block + per_id) + table,
            )
        )
    embed = ShardedEmbedding(FakeGang(device, size=size), vocab, dim, device=device, dtype=dtype)
    # Forward: rows read, sent, and concatenated. Backward: the gradient, and zeros of the table.
    nbytes = count * block + tokens * block + 2 * tokens * row + tokens * block + table
    name = "forward and backward of the layer, nothing sent"
    steps.append(Step(name, training(embed, ids, grad), nbytes))
    return steps


def training(embed: torch.nn.Module, ids: Tensor, grad: Tensor) -> Callable[[], None]:
    """Returns a function that runs a forward and a backward into a new gradient."""

    def forward_backward() -> None:
        embed.zero_grad()
        embed(ids).backward(grad)

    return forward_backward


def to_markdown(name: str, options: str, copied: Timing, timings: list[Timing]) -> str:
    lines = [
        f"# {name}",
        "",
        f"{options}. Medians, by `benchmarks/gpu.py`. A copy of memory "
        f"reads and writes {copied.bandwidth / 1e9:.0f} GB/s.",
        "",
        "| step | us | GB/s | share of the copy |",
        "|---|---|---|---|",
    ]
    for timing in timings:
        share = timing.bandwidth / copied.bandwidth
        lines.append(
            f"| {timing.name} | {timing.seconds * 1e6:.0f} | {timing.bandwidth / 1e9:.1f} | "
            f"{share:.0%} |"
        )
    return "\n".join(lines) + "\n"


def name_of(device: str) -> str:
    kind = torch.device(device).type
    if kind != "cpu":
        module: Any = getattr(torch, kind)
        return str(module.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"
