"""Times the ways to the cross entropy of an output head that is cut over the vocabulary.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/loss.py

Forward and backward of `OutputHead.loss()`, of DeepSpeed's `vocab_parallel_linear_cross_entropy`,
of the cross entropy of each rank's logits, and of that of all logits, which the head gathers. Runs
are interleaved; printed is the median time, with minimum and maximum as ratios to the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from torch import Tensor

from tp_embed import OutputHead, VocabShardedEmbedding
from tp_embed.integrations.deepspeed import DeepSpeedGang
from tp_embed.loss import cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def ways(embed: VocabShardedEmbedding) -> dict[str, Loss]:
    gang, head = embed.gang, OutputHead(embed)
    shard_head = OutputHead(embed, output="shard")

    def by_deepspeed(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = vocab_parallel_linear_cross_entropy(
            x,
            embed.weight,
            target,
            tp_group=gang.as_process_group(),
            vocab_start_index=embed.rows.start,
            vocab_end_index=embed.rows.stop,
        )
        return loss

    return {
        "OutputHead.loss()": head.loss,
        "DeepSpeed, fused": by_deepspeed,
        "logits of each rank": lambda x, target: cross_entropy(
            shard_head(x), target, gang, embed.partition
        ),
        "all logits": lambda x, target: torch.nn.functional.cross_entropy(head(x).float(), target),
    }


def seconds(loss: Loss, embed: VocabShardedEmbedding, x: Tensor, target: Tensor) -> float:
    embed.zero_grad()
    x = x.detach().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    loss(x, target).backward()
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=64_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    gang = DeepSpeedGang.from_groups(tp_size=dist.get_world_size())
    dtype = getattr(torch, arguments.dtype)
    embed = VocabShardedEmbedding(gang, arguments.vocab_size, arguments.dim, dtype=dtype)
    x = torch.randn(arguments.tokens, arguments.dim, dtype=dtype)
    target = torch.randint(arguments.vocab_size, (arguments.tokens,))

    times: dict[str, list[float]] = {name: [] for name in ways(embed)}
    for turn in range(arguments.runs + 1):
        for name, loss in ways(embed).items():
            took = seconds(loss, embed, x, target)
            if turn > 0:  # The first is to warm up.
                times[name].append(took)
    if dist.get_rank() == 0:
        reference = statistics.median(times["OutputHead.loss()"])
        for name, found in times.items():
            ratio, low, high = (f(found) / reference for f in (statistics.median, min, max))
            print(
                f"{name}: {statistics.median(found):.2f} s, {ratio:.2f} ({low:.2f} to {high:.2f})"
            )


if __name__ == "__main__":
    main()
