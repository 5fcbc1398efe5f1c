"""A small model, and directories of tp_embed that it is saved in."""

from __future__ import annotations

import math

import torch
from torch import nn

from tp_embed.checkpoint import ReadOptions, Request, Rule, convert

V, E = 11, 6
RULES = (
    Rule.parse("embed.weight=vocab"),
    Rule.parse("few.weight=vocab"),
    Rule.parse("qkv.*=0/3"),
    Rule.parse("gqa.*=0:8,4,4"),
    Rule.parse("out.weight=1"),
    Rule.parse("*=replicated"),
)
BLOCKS = {"qkv.weight": [6, 6, 6], "gqa.weight": [8, 4, 4], "few.weight": [3], "embed.weight": [V]}


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(V, E)
        self.few = nn.Embedding(3, E)  # Fewer rows than four ranks.
        self.qkv = nn.Linear(E, 3 * E, bias=False)
        self.gqa = nn.Linear(E, 16, bias=False)
        self.out = nn.Linear(E, E, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(E)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(5))
        self.register_buffer("scale", torch.tensor(float("nan")))


def trained(optimizer=torch.optim.AdamW):
    model = Model()
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if n != "norm.bias"]},
        {"params": [("norm.bias", model.norm.bias)], "lr": 1e-5, "weight_decay": 0.0},
    ]
    adam = optimizer(groups, lr=0.1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        adam.step()
    adam.param_groups[1]["more"] = (math.inf, [None, True, (1, -0.0)], {3: "x", "$y": 1e-300})
    return model, adam


def save(path, model, optimizer=None):
    root = {"model": model.state_dict(), "step": 3}
    root["buffer_names"] = [name for name, _ in model.named_buffers()]
    if optimizer is not None:
        root["optimizer"] = optimizer.state_dict()
    torch.save(root, path)
    return path


def request(to="tp-embed", source="tp-embed", rules=(), **more):
    return Request(to=to, source_format=source, read=ReadOptions(rules=rules), **more)


def file_of(path, rank, size):
    return path / f"rank-{rank:05}-of-{size:05}.safetensors"


def write_two_ranks(source, path):
    """Converts `source` for two tensor-parallel ranks."""
    convert(source, path, request(source="pt", rules=RULES, tp_size=2))
    return path
