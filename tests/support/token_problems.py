"""What values of tokens are compared with: torch on all logits.

Each way of :data:`WAYS` is a pair of functions with values of the same shape. Ours gets heads and
hidden states of a student and a teacher, and targets; torch's gets their logits, and targets.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loss_problems import capped, expected_loss
from tp_embed import OutputHead, StandardEmbedding

N, V, E, TEACHER_E = 10, 11, 6, 5
IGNORED = 4


def class_weights(num_classes=V):
    return torch.linspace(0.2, 1.7, num_classes, dtype=torch.float64)


def plain_loss(logits, _, target, *, weighted=False, **options):
    weight = class_weights(logits.size(-1)).to(logits.dtype) if weighted else None
    if "z_loss" in options:
        flat = logits.flatten(0, -2), target.flatten()
        losses = functional.cross_entropy(*flat, reduction="none")
        valid = flat[1] != -100
        return (losses + options["z_loss"] * flat[0].logsumexp(-1).square() * valid).view_as(target)
    losses = functional.cross_entropy(
        logits.flatten(0, -2), target.flatten(), weight=weight, **options
    )
    return losses.view_as(target) if options.get("reduction") == "none" else losses


def plain_log_probs(logits, _, target):
    if target.dim() == logits.dim() - 1:
        target = target[..., None]
        return plain_log_probs(logits, _, target)[..., 0]
    kept = target != -100
    return logits.log_softmax(-1).gather(-1, target.masked_fill(~kept, 0)).where(kept, 0.0)


def plain_entropy(logits, *_):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def plain_divergence(logits, teacher_logits, _, *, reverse=False):
    distributions = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if not reverse:
        distributions = distributions[::-1]
    first, second = distributions
    return functional.kl_div(second, first, reduction="none", log_target=True).sum(-1)


def plain_top_k(logits, *_, k=4):
    return logits.topk(k, dim=-1).values


def several(target, num_classes=V):
    """Three targets for each token."""
    return torch.stack([target, (target + 1) % num_classes, torch.full_like(target, -100)], -1)


def by_loss(head, x, teacher, target, *, weighted=False, **options):
    weight = class_weights(head.out_features).to(x.dtype) if weighted else None
    return head.loss(x, target, weight=weight, **options)


LOSSES: dict[str, dict[str, Any]] = {
    "losses": {"reduction": "none"},
    "losses with z": {"reduction": "none", "z_loss": 0.1},
    "smooth losses": {"reduction": "none", "label_smoothing": 0.2, "ignore_index": IGNORED},
    "weighted losses": {"reduction": "none", "weighted": True},
    "weighted, smooth sum": {"reduction": "sum", "weighted": True, "label_smoothing": 0.3},
    "weighted mean": {"weighted": True, "ignore_index": IGNORED},
    "weighted, smooth mean": {"weighted": True, "label_smoothing": 0.3},
}

# Ours, torch's, and whether both divide logits by a temperature.
WAYS: dict[str, tuple[Any, Any, bool]] = {
    **{
        name: (partial(by_loss, **options), partial(plain_loss, **options), False)
        for name, options in LOSSES.items()
    },
    "log-probs": (
        lambda head, x, teacher, target, **options: head.log_probs(x, target, **options),
        plain_log_probs,
        True,
    ),
    "log-probs of several": (
        lambda head, x, teacher, target, **options: head.log_probs(
            x, several(target, head.out_features), **options
        ),
        lambda logits, _, target: plain_log_probs(logits, _, several(target, logits.size(-1))),
        True,
    ),
    "entropy": (
        lambda head, x, teacher, target, **options: head.entropy(x, **options),
        plain_entropy,
        True,
    ),
    "divergence": (
        lambda head, x, teacher, target, **options: head.kl_divergence(x, *teacher, **options),
        plain_divergence,
        True,
    ),
    "reverse divergence": (
        lambda head, x, teacher, target, **options: head.kl_divergence(
            x, *teacher, reverse=True, **options
        ),
        partial(plain_divergence, reverse=True),
        True,
    ),
    "top k": (
        lambda head, x, teacher, target: head.top_k(x, 4)[0],
        plain_top_k,
        False,
    ),
}


def problem(num_classes=V, dtype=torch.float64, dim=E):
    """Returns table, bias and hidden states of a student and of a teacher, and targets."""
    torch.manual_seed(3)
    sides = []
    for width in (dim, TEACHER_E):
        table = StandardEmbedding(num_classes, width, dtype=dtype)
        bias = nn.Parameter(torch.randn(num_classes, dtype=dtype))
        sides.append((table, bias, torch.randn(2, N // 2, width, dtype=dtype)))
    target = torch.randint(num_classes, (2, N // 2))
    target[0, 1], target[1, 2] = -100, IGNORED
    return *sides, target


def logits_of(side, soft_cap=None, temperature=1.0):
    table, bias, x = side
    return capped(functional.linear(x, table.weight, bias), soft_cap) / temperature


def heads(kind, gang, student, teacher, soft_cap=None):
    """Returns the student's embedding and head, and the teacher as our functions take it."""
    embed = kind.from_embedding(student[0], gang)
    teacher_embed = kind.from_embedding(teacher[0], gang)
    head = OutputHead(embed, bias=student[1], soft_cap=soft_cap)
    teacher_head = OutputHead(teacher_embed, bias=teacher[1], soft_cap=soft_cap)
    return embed, head, (teacher[2], teacher_head)


__all__ = ["WAYS", "E", "N", "V", "expected_loss", "heads", "logits_of", "problem"]
