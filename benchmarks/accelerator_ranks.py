"""Checks lookups of ranks that share one device, over a real gang with gloo.

NCCL refuses two ranks on one GPU; gloo copies GPU tensors through the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from tp_embed import (
    BatchLayout,
    Gang,
    OutputHead,
    Partition,
    ProcessGroupGang,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)

V, E = 29, 7
OUTPUTS: tuple[Literal["replicated", "sequence"], ...] = ("replicated", "sequence")
KINDS: tuple[type[ShardedEmbedding | VocabShardedEmbedding], ...] = (
    ShardedEmbedding,
    VocabShardedEmbedding,
)


def run(rank: int, size: int, device: str, store: Path) -> list[str]:
    """Lists differences from torch.nn.Embedding on the CPU, on this rank of ``size``.

    :param store: a file that does not exist yet, the same on every rank.
    """
    kind = torch.device(device).type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    try:
        gang = ProcessGroupGang(None, device)
        return [*_lookups(gang), *_losses(gang)]
    finally:
        dist.destroy_process_group()


def _lookups(gang: Gang) -> Iterator[str]:
    options = product(KINDS, OUTPUTS, (False, True), (None, 3), (10, 4096), (V, gang.size - 1))
    for kind, output, dedup, pad_idx, length, vocab in options:
        if vocab < 1 or (pad_idx is not None and pad_idx >= vocab):
            continue
        torch.manual_seed(length)
        whole = StandardEmbedding(vocab, E, pad_idx)
        embed = kind.from_embedding(whole, gang, output=output, dedup=dedup).to(gang.device)
        ids, grad = torch.randint(vocab, (2, length)), torch.randn(2, length, E)
        for lens in (None, [length, length // 2]):
            layout = BatchLayout.of(ids, lens)
            yield from _compare(embed, whole, ids, grad, layout)


def _compare(
    embed: Any, whole: StandardEmbedding, ids: Tensor, grad: Tensor, layout: BatchLayout
) -> Iterator[str]:
    gang, device, part = embed.gang, embed.weight.device, slice(None)
    if embed.output == "sequence":
        own = Partition(ids.size(1), gang.size).shard(gang.rank)
        part = slice(own.start, own.stop)
    whole.zero_grad()
    embed.zero_grad()
    expected = whole(ids, layout)
    expected.backward(grad)
    found = embed(ids.to(device), layout)
    found.backward(grad[:, part].to(device))
    assert whole.weight.grad is not None
    rows, columns = embed.rows, embed.columns
    wanted = whole.weight.grad[rows.start : rows.stop, columns.start : columns.stop]
    where = f"{embed}, ids {tuple(ids.shape)}, padded {layout.padded}"
    if not torch.equal(found.detach().cpu(), expected[:, part].detach()):
        yield f"output of {where}"
    if not torch.allclose(embed.weight.grad.cpu(), wanted, rtol=1e-5, atol=1e-4):
        yield f"gradient of {where}: {(embed.weight.grad.cpu() - wanted).abs().max()}"


def _losses(gang: Gang) -> Iterator[str]:
    for kind in KINDS:
        torch.manual_seed(0)
        whole = StandardEmbedding(V, E)
        head = OutputHead(kind.from_embedding(whole, gang).to(gang.device))
        x, target = torch.randn(40, E), torch.randint(V, (40,))
        target[::7] = -100
        own, reference = (x.clone().to(d).requires_grad_() for d in (gang.device, "cpu"))
        expected = cross_entropy(reference @ whole.weight.t(), target)
        expected.backward()
        found = head.loss(own, target.to(gang.device))
        found.backward()
        assert own.grad is not None
        assert reference.grad is not None
        if not torch.allclose(found.detach().cpu(), expected.detach(), rtol=1e-5):
            yield f"loss of {head}: {found}, not {expected}"
        if not torch.allclose(own.grad.cpu(), reference.grad, rtol=1e-4, atol=1e-6):
            yield f"gradient of the hidden states of {head}"
        logits = head(x.to(gang.device)).detach().cpu()
        if not torch.allclose(logits, (x @ whole.weight.t()).detach(), rtol=1e-4, atol=1e-5):
            yield f"logits of {head}"
