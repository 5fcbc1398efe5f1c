"""Times the cross entropy of an output head that is cut over the vocabulary, computed in many ways.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/loss.py --markdown docs/performance.md

Forward and backward of `OutputHead.loss()` in each option, DeepSpeed's
`vocab_parallel_linear_cross_entropy`, the cross entropy of each rank's logits, the same of all
logits, which the head gathers, and, on one rank, torch's chunked `linear_cross_entropy`. They take
turns in one process per rank. Prints medians of the time until all ranks are done; of the mean CPU
time of a rank, which other work on the machine disturbs less; and of the largest growth of a rank's
memory, including gradients of table and hidden states; with the median of the ratios to DeepSpeed's
in the same turn."""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from torch import Tensor
from torch.nn import functional

from machine import forget_peak, peak
from pages import insert
from tp_embed import OutputHead, VocabShardedEmbedding
from tp_embed.integrations.deepspeed import DeepSpeedGang
from tp_embed.nn.init import normal
from tp_embed.nn.loss import cross_entropy
from tp_embed.parameter.sharded import ShardedParameter

Loss = Callable[[Tensor, Tensor], Tensor]
PEER = "DeepSpeed's `vocab_parallel_linear_cross_entropy`"
OURS = "`OutputHead.loss()`"
BEGIN, END = "<!-- The figures of benchmarks/loss.py: -->", "<!-- End of the losses. -->"
# Tokens, V, E, and the number of turns.
SIZES = ["512,16384,512,5", "1024,65536,128,5", "2048,32768,1024,3", "2048,131072,1024,1"]


def ways(embed: VocabShardedEmbedding) -> dict[str, Loss]:
    gang, head = embed.gang, OutputHead(embed)
    shard_head = OutputHead(embed, output="shard")
    same_bits = OutputHead(embed, deterministic="topology")

    def by_deepspeed(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = vocab_parallel_linear_cross_entropy(
            x,
            embed.weight.to_local() if isinstance(embed.weight, ShardedParameter) else embed.weight,
            target,
            tp_group=gang.as_process_group(),
            vocab_start_index=embed.rows.start,
            vocab_end_index=embed.rows.stop,
        )
        return loss

    found: dict[str, Loss] = {
        PEER: by_deepspeed,
        OURS: head.loss,
        f"{OURS}, `soft_cap`": partial(head.loss, soft_cap=30.0),
        f"{OURS}, `label_smoothing` and `z_loss`": partial(
            head.loss, label_smoothing=0.1, z_loss=1e-4
        ),
    }
    found[f'{OURS}, `deterministic="topology"`'] = same_bits.loss
    if embed.weight.dtype == torch.bfloat16:
        found[f"{OURS}, `accum_dtype=torch.float32`"] = partial(
            head.loss, accum_dtype=torch.float32
        )
    if gang.size == 1:
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch's `linear_cross_entropy`, chunked"] = lambda x, target: (
            functional.linear_cross_entropy(x, embed.weight, target, options=options)
        )
    return {
        **found,
        "logits of each rank, `cross_entropy()`": lambda x, target: cross_entropy(
            shard_head(x), target, gang, embed.partition
        ),
        "all logits": lambda x, target: functional.cross_entropy(head(x).float(), target),
    }


def measure(
    loss: Loss, embed: VocabShardedEmbedding, x: Tensor, target: Tensor
) -> tuple[float, float, float]:
    """Returns seconds, CPU seconds, and MiB of a forward and backward."""
    embed.zero_grad()
    x = x.detach().requires_grad_()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # Else one way reuses memory of another.
    forget_peak()
    before = peak()
    dist.barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    loss(x, target).backward()
    cpu = torch.tensor((time.process_time() - start_cpu) / dist.get_world_size())
    dist.barrier()
    seconds = time.perf_counter() - start
    grown = torch.tensor((peak() - before) / 1024)
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    dist.all_reduce(cpu)
    return seconds, cpu.item(), grown.item()


def rows(found: dict[str, list[tuple[float, float, float]]], size: str) -> list[str]:
    lines = []
    for name, measured in found.items():
        cells = []
        for index, digits in ((0, 2), (1, 2), (2, 0)):
            values = [m[index] for m in measured]
            ratios = [v / peer[index] for v, peer in zip(values, found[PEER], strict=True)]
            cells += [f"{statistics.median(values):.{digits}f}", f"{statistics.median(ratios):.2f}"]
        lines.append(f"| {size} | {name} | {' | '.join(cells)} |")
    return lines


def compare(gang: DeepSpeedGang, size: str, dtype: torch.dtype, patterns: list[str]) -> list[str]:
    tokens, vocab_size, dim, runs = map(int, size.split(","))
    torch.manual_seed(0)
    # Logits as in a model: far apart, `exp()` is slow.
    init_fn = partial(normal, std=dim**-0.5)
    embed = VocabShardedEmbedding(gang, vocab_size, dim, init_fn=init_fn, dtype=dtype)
    x = torch.randn(tokens, dim, dtype=dtype)
    target = torch.randint(vocab_size, (tokens,))
    chosen = {
        name: loss
        for name, loss in ways(embed).items()
        if name == PEER or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for loss in chosen.values():
        measure(loss, embed, x[:128], target[:128])  # To warm up.
    for _ in range(runs):
        for name, loss in chosen.items():
            found[name].append(measure(loss, embed, x, target))
            if dist.get_rank() == 0:
                print(name, *(f"{value:.2f}" for value in found[name][-1]), flush=True)
    lines = rows(found, f"{tokens}, {vocab_size}, {dim}")
    if dist.get_rank() == 0:
        print("\n".join(lines), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="tokens,V,E,turns")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", default=["*"], help="only these, by their names")
    parser.add_argument("--markdown", type=Path, help="the page to write the figures into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    gang = DeepSpeedGang.from_groups(tp_size=dist.get_world_size())
    parts = []
    for name in arguments.dtypes:
        lines = [
            f"{name}, P = {gang.size}:",
            "",
            "| N, V, E | | s | of DeepSpeed's | CPU s | of DeepSpeed's | MiB | of DeepSpeed's |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for size in arguments.sizes:
            lines += compare(gang, size, getattr(torch, name), arguments.ways)
        parts.append("\n".join(lines))
    if dist.get_rank() == 0:
        text = "\n\n".join(parts)
        print(text)
        if arguments.markdown is not None:
            insert(arguments.markdown, BEGIN, END, text)


if __name__ == "__main__":
    main()
