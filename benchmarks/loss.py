"""Times the cross entropy of an output head that is cut over the vocabulary, computed four ways.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/loss.py

Forward and backward of `OutputHead.loss()`, DeepSpeed's `vocab_parallel_linear_cross_entropy`, the
cross entropy of each rank's logits, and the cross entropy of all logits, which the head gathers.
They take turns in one process per rank. Prints medians, and the median, smallest and largest ratio
to DeepSpeed's in the same turn, for the time until all ranks are done; for the mean CPU time of a
rank, which other work on the machine disturbs less; and for the largest growth of a rank's memory,
including gradients of table and hidden states.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from torch import Tensor
from torch.nn import functional

from machine import forget_peak, peak
from tp_embed import OutputHead, VocabShardedEmbedding
from tp_embed.integrations.deepspeed import DeepSpeedGang
from tp_embed.nn.init import normal
from tp_embed.nn.loss import cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]
PEER = "DeepSpeed, fused"


def ways(embed: VocabShardedEmbedding) -> dict[str, Loss]:
    gang, head = embed.gang, OutputHead(embed)
    shard_head = OutputHead(embed, output="shard")

    def by_deepspeed(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = vocab_parallel_linear_cross_entropy(
            x,
            embed.weight.to_local(),  # type: ignore[attr-defined]
            target,
            tp_group=gang.as_process_group(),
            vocab_start_index=embed.rows.start,
            vocab_end_index=embed.rows.stop,
        )
        return loss

    return {
        "`OutputHead.loss()`": head.loss,
        PEER: by_deepspeed,
        "logits of each rank": lambda x, target: cross_entropy(
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


def table(found: dict[str, list[tuple[float, float, float]]]) -> str:
    lines = [
        "| | s | of DeepSpeed's | CPU s | of DeepSpeed's | MiB | of DeepSpeed's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measured in found.items():
        cells = []
        for index, digits in ((0, 2), (1, 2), (2, 0)):
            values = [m[index] for m in measured]
            ratios = [v / peer[index] for v, peer in zip(values, found[PEER], strict=True)]
            ratio, least, most = statistics.median(ratios), min(ratios), max(ratios)
            cells += [f"{statistics.median(values):.{digits}f}"]
            cells += [f"{ratio:.2f} ({least:.2f} to {most:.2f})"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=131_072)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ways", type=int, nargs="+", default=[0, 1, 2, 3], help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    gang = DeepSpeedGang.from_groups(tp_size=dist.get_world_size())
    vocab_size, dim, dtype = arguments.vocab_size, arguments.dim, getattr(torch, arguments.dtype)
    # Logits as in a model: far apart, `exp()` is slow.
    init_fn = partial(normal, std=dim**-0.5)
    embed = VocabShardedEmbedding(gang, vocab_size, dim, init_fn=init_fn, dtype=dtype)
    x = torch.randn(arguments.tokens, dim, dtype=dtype)
    target = torch.randint(vocab_size, (arguments.tokens,))

    functions = list(ways(embed).items())
    chosen = dict(functions[index] for index in arguments.ways)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for loss in chosen.values():
        measure(loss, embed, x[:128], target[:128])  # To warm up.
    for _ in range(arguments.runs):
        for name, loss in chosen.items():
            found[name].append(measure(loss, embed, x, target))
            if dist.get_rank() == 0:
                print(name, *(f"{value:.2f}" for value in found[name][-1]), flush=True)
    if dist.get_rank() == 0:
        print(
            f"{arguments.tokens} tokens, V = {vocab_size}, E = {dim}, P = {gang.size}, "
            f"{arguments.dtype}, {arguments.runs} runs:\n\n{table(found)}"
        )


if __name__ == "__main__":
    main()
