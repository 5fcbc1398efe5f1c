"""Cases of :mod:`compatibility`: what users do with the logits of a head, for each ``output``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional

from compatibility import DIM, ROWS, Case, Seen, World, ids, noise
from tp_embed import OutputHead

OUTPUTS = ("replicated", "deferred", "shard")

# Gets logits, *Shape:* (8, V), and targets.
Use = Callable[[Any, Tensor], Any]

WEIGHTS = torch.linspace(0.2, 1.7, ROWS)
TEACHER = noise(8, ROWS, seed=5).log_softmax(-1)


def _selected(logits: Any, target: Tensor) -> Tensor:
    """As TRL's `selective_log_softmax`."""
    chosen: Tensor = logits.gather(-1, target[:, None])[:, 0] - torch.logsumexp(logits, -1)
    return chosen


def _top_p(logits: Any, target: Tensor) -> Tensor:
    values, order = torch.sort(logits, descending=True)
    shares = torch.softmax(values, -1)
    kept = shares.cumsum(-1) - shares < 0.8
    found: Tensor = logits.masked_fill(~kept.scatter(1, order, kept), -torch.inf).softmax(-1)
    return found


def _sampled(logits: Any, target: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.multinomial(torch.softmax(logits / 0.7, -1), 2, replacement=True)


def _gumbel(logits: Any, target: Tensor) -> Tensor:
    torch.manual_seed(1)
    return functional.gumbel_softmax(logits)


USES: dict[str, tuple[str, Use]] = {
    "loss": ("`F.cross_entropy(logits, target)`", functional.cross_entropy),
    "losses": (
        '`F.cross_entropy(..., reduction="none")`',
        partial(functional.cross_entropy, reduction="none"),
    ),
    "weighted_loss": (
        "`F.cross_entropy(..., weight=..., label_smoothing=0.1)`",
        partial(functional.cross_entropy, weight=WEIGHTS, label_smoothing=0.1),
    ),
    "soft_targets": (
        "`F.cross_entropy(logits, probabilities)`",
        lambda y, t: functional.cross_entropy(y, TEACHER.exp()),
    ),
    "log_probs": (
        "`log_softmax(-1).gather(-1, ids)`, as in RL",
        lambda y, t: y.log_softmax(-1).gather(-1, t[:, None]),
    ),
    "selected": ("`logits.gather(-1, ids) - logits.logsumexp(-1)`, as in TRL", _selected),
    "nll_loss": (
        "`F.nll_loss(F.log_softmax(logits, -1), target)`",
        lambda y, t: functional.nll_loss(functional.log_softmax(y, -1), t),
    ),
    "kl_div": (
        "`F.kl_div(log_softmax(logits), teacher)`",
        lambda y, t: functional.kl_div(
            functional.log_softmax(y, -1), TEACHER, log_target=True, reduction="batchmean"
        ),
    ),
    "mse_loss": (
        "`F.mse_loss(logits, teacher)`",
        lambda y, t: functional.mse_loss(y, TEACHER),
    ),
    "z_loss": ("a z-loss: `logits.logsumexp(-1) ** 2`", lambda y, t: y.logsumexp(-1) ** 2),
    "entropy": (
        "`Categorical(logits=logits).entropy()`",
        lambda y, t: Categorical(logits=y).entropy(),
    ),
    "categorical": (
        "`Categorical(logits=logits).log_prob(ids)`",
        lambda y, t: Categorical(logits=y).log_prob(t),
    ),
    "topk": ("`logits.topk(3)`", lambda y, t: y.topk(3)),
    "argmax": (
        "`logits.argmax(-1)`, `logits.max(-1)`",
        lambda y, t: (y.argmax(-1), y.max(-1).values),
    ),
    "multinomial": ("sample: `multinomial(softmax(logits / t))`", _sampled),
    "gumbel": ("sample: `F.gumbel_softmax(logits)`", _gumbel),
    "top_p": ("filter the top p, by `sort` and `cumsum`", _top_p),
    "numpy": (
        "convert: `logits.detach().numpy()`",
        lambda y, t: torch.from_numpy(y.detach().numpy()),
    ),
    "classes": (
        "compare two classes: `logits[:, yes] - logits[:, no]`",
        lambda y, t: y[:, 6] - y[:, 0],
    ),
}


def head_of(world: World, embed: Any, output: str) -> Any:
    head = world.head(embed)
    return OutputHead(embed, output=output) if isinstance(head, OutputHead) else head  # type: ignore[arg-type]


def used(use: str, output: str, world: World) -> Seen:
    """Returns what one of :data:`USES` returns, and the gradients of a loss of it."""
    embed, target = world.embedding(), ids().flatten()
    x = noise(8, DIM, seed=6).requires_grad_()
    found = USES[use][1](head_of(world, embed, output)(x), target)
    seen = [found] if isinstance(found, Tensor) else list(found)
    if seen[0].requires_grad:
        seen[0].mul(torch.linspace(0.5, 2.0, seen[0].numel()).view_as(seen[0])).sum().backward()
        seen += [x.grad, world.whole(embed, embed.weight.grad)]
    return seen


def logits_cases() -> list[Case]:
    return [
        Case(f"{output}_{use}", f'Logits, `output="{output}"`', text, partial(used, use, output))
        for output in OUTPUTS
        for use, (text, _) in USES.items()
    ]


def torchs_fused_loss(world: World) -> Seen:
    """Fuse the loss by torch: `F.linear_cross_entropy(x, head.weight, target)`"""
    x, embed = noise(8, DIM), world.embedding()
    return (functional.linear_cross_entropy(x, embed.weight, ids().flatten()),)


def torchs_fused_loss_in_chunks(world: World) -> Seen:
    """Fuse it in chunks: `F.linear_cross_entropy(..., options=LinearCrossEntropyOptions())`"""
    x, embed = noise(8, DIM), world.embedding()
    options = torch.nn.LinearCrossEntropyOptions()
    target = ids().flatten()
    return (functional.linear_cross_entropy(x, embed.weight, target, options=options),)


def fused_loss_by_hand(world: World) -> Seen:
    """Write a loss in chunks: `F.cross_entropy(x[i:j] @ head.weight.T, target[i:j])`"""
    x, embed, target = noise(8, DIM), world.embedding(), ids().flatten()
    parts = [
        functional.cross_entropy(x[i : i + 4] @ embed.weight.T, target[i : i + 4]) for i in (0, 4)
    ]
    return (torch.stack(parts),)
