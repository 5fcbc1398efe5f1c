"""Measures time and memory to initialise a rank's shard of a new table, against drawing the whole
table and keeping the shard, and against `normal_` on the shard alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from machine import forget_peak, peak
from tp_embed import FakeGang, ShardedEmbedding, VocabShardedEmbedding


def measure_initialisation(vocab: int, dim: int, size: int, rounds: int) -> dict[str, Any]:
    """Returns seconds and MiB of each round by name, and the shard's size, in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (vocab, dim, size, rounds))


def _measure(vocab: int, dim: int, size: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    gang = FakeGang("cpu", rank=1, size=size)
    columns, rows = dim // size, vocab // size
    ways: dict[str, Callable[[int, int], Tensor]] = {
        "tp_embed embed": lambda v, e: ShardedEmbedding(gang, v, e).weight,
        "tp_embed vocab": lambda v, e: VocabShardedEmbedding(gang, v, e).weight,
        "whole table, columns": lambda v, e: (
            torch.nn.Embedding(v, e).weight.detach()[:, columns : 2 * columns].clone()
        ),
        "whole table, rows": lambda v, e: (
            torch.nn.Embedding(v, e).weight.detach()[rows : 2 * rows].clone()
        ),
        "normal_ on the shard": lambda v, e: torch.empty(v, e // size).normal_(),
    }
    for way in ways.values():
        way(64, 64)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    mebibytes: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            forget_peak()
            before, start = peak(), time.perf_counter()
            way(vocab, dim)
            seconds[name].append(time.perf_counter() - start)
            mebibytes[name].append((peak() - before) / 1024)
    return {
        "vocab": vocab,
        "dim": dim,
        "size": size,
        "shard": vocab * dim * 4 / size / 2**20,
        "seconds": seconds,
        "mebibytes": mebibytes,
    }
