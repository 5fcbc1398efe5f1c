"""A small model and its checkpoints of `torch.distributed.checkpoint`."""

from __future__ import annotations

import copy

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import Replicate, distribute_tensor

from tp_embed.checkpoint import Request

V, E = 11, 6
TO_PT = Request(to="pt", source_format="dcp")
TO_DCP = Request(to="dcp", source_format="pt")


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(V, E)
        self.other = nn.Embedding(3, E)  # Fewer rows than four ranks.
        self.mix = nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids) + self.other(ids % 3))) * self.scale


def optimizer_of(model):
    tables = [(n, p) for n, p in model.named_parameters() if "mix" not in n]
    rest = [(n, p) for n, p in model.named_parameters() if "mix" in n]
    return torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.0}, {"params": rest}], lr=3e-3, betas=(0.8, 0.95)
    )


def train(model, optimizer, steps=2):
    for _ in range(steps):
        model(torch.arange(V)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_model():
    model = Model()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    return model, optimizer


def save(content, path, **kwargs):
    dcp.save(content, storage_writer=FileSystemWriter(path, **kwargs), no_dist=True)
    return path


def assert_model(path, model, prefix=""):
    """Asserts that the file of `torch.save()` at `path` has the weights of `model`."""
    loaded = torch.load(path)["model"]
    expected = model.state_dict()
    assert {key.removeprefix(prefix) for key in loaded} == set(expected)
    for key, value in expected.items():
        assert torch.equal(loaded[prefix + key], value), key


def assert_same_training(path, model, optimizer):
    """Asserts that training continues the same from the file and from `optimizer`."""
    assert_model(path, model)
    root = torch.load(path)
    other = Model(seed=1)
    restored = optimizer_of(other)
    other.load_state_dict(root["model"])
    restored.load_state_dict(root["optimizer"])
    assert_trains_alike(model, optimizer, other, restored)


def assert_trains_alike(model, optimizer, other, restored):
    model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer)
    train(other, restored)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def forms(model, optimizer):
    """Returns the forms that training scripts save."""
    weights, state = get_state_dict(model, optimizer)
    flat = get_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )[1]
    return {
        "nested": {"model": weights, "optimizer": state, "step": 2, "schedule": {"last": 1}},
        "optim": {"module": weights, "optim": state},
        "app": {"app": {"model": weights, "optim": state}},
        "by index": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        # torchtitan's.
        "flat": {**weights, "optimizer": flat, "train_state": {"step": torch.tensor(2)}},
        "all flat": {**weights, **flat},
    }


def cut(mesh, tensor, placements):
    placement = next((p for p in placements if p.dim < tensor.dim()), Replicate())
    return distribute_tensor(tensor.detach(), mesh, [placement])
