"""A model with several heads over one table, as multi-token prediction has them (DeepSeek-V3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tp_embed import OutputHead

V, E, DEPTH, WEIGHT = 23, 8, 2, 0.3


class Mtp(nn.Module):
    """Predicts the token after the next one, from hidden states and the next token."""

    def __init__(self, model: Model, bias: bool, same: bool) -> None:
        super().__init__()
        self.embed, self.head = model.embed, model.head
        if not same:  # Modules of its own, with the Parameters of the model's.
            self.embed, self.head = nn.Embedding(V, E), nn.Linear(E, V, bias=bias)
            self.embed.weight, self.head.weight = model.embed.weight, model.head.weight
        self.mix = nn.Linear(2 * E, E)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        mixed: Tensor = self.mix(torch.cat([x, self.embed(ids)], -1))
        return mixed.tanh()


class Model(nn.Module):
    """
    :param tied: whether the heads share the table of the embeddings.
    :param same: whether modules are shared, and not only their Parameters.
    :param bias: whether each head has a bias.
    """

    def __init__(self, *, tied: bool = True, same: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.between = nn.Embedding(V, E), nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.mtp = nn.ModuleList([Mtp(self, bias, same) for _ in range(DEPTH)])

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the sum of the losses of all heads, for ids of DEPTH + 1 more tokens."""
        length = ids.size(1) - DEPTH - 1
        x = self.between(self.embed(ids[:, :length])).tanh()
        loss = head_loss(self.head, x, ids[:, 1 : length + 1])
        for depth, mtp in enumerate(self.mtp, start=1):
            x = mtp(x, ids[:, depth : depth + length])
            target = ids[:, depth + 1 : depth + 1 + length]
            loss = loss + WEIGHT * head_loss(mtp.head, x, target)
        return loss

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def head_loss(head: Any, x: Tensor, target: Tensor) -> Tensor:
    if isinstance(head, OutputHead):
        return head.loss(x, target)
    logits = head(x)
    return cross_entropy(logits.flatten(0, 1), target.flatten())


MODELS: dict[str, dict[str, bool]] = {
    "tied": {},
    "tied, with biases": {"bias": True},
    "tied, the same modules": {"same": True},
    "untied": {"tied": False},
    "untied, with biases": {"tied": False, "bias": True},
    "untied, the same modules": {"tied": False, "same": True},
}


def build(name: str) -> Model:
    torch.manual_seed(0)
    return Model(**MODELS[name])


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(V, (steps, 2, 6 + DEPTH + 1), generator=generator))
