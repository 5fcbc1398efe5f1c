"""What losses are compared with: torch's cross entropy of all logits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tp_embed import StandardEmbedding

N, V, E = 10, 11, 6


def capped(logits, soft_cap):
    return logits if soft_cap is None else soft_cap * (logits / soft_cap).tanh()


def expected_loss(
    logits, target, *, soft_cap=None, z_loss=0.0, ignore_index=-100, reduction="mean", **options
):
    """By torch, with the soft cap and the z-loss written out."""
    logits = capped(logits, soft_cap)
    loss = functional.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="none", **options
    )
    valid = target != ignore_index
    loss = loss + z_loss * logits.logsumexp(-1).square() * valid
    return loss.sum() / valid.sum() if reduction == "mean" else loss.sum()


def problem(num_classes, dtype=torch.float64, dim=E):
    torch.manual_seed(3)
    table = StandardEmbedding(num_classes, dim, dtype=dtype)
    bias = nn.Parameter(torch.randn(num_classes, dtype=dtype))
    x = torch.randn(2, N // 2, dim, dtype=dtype, requires_grad=True)
    target = torch.randint(num_classes, (2, N // 2))
    target[0, 1] = -100
    return table, bias, x, target
