"""Cases of :mod:`compatibility`: optimizers, compilers, and wrappers of models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from compatibility import Case, Model, Seen, World, ids

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.01, eps=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, eps=1e-3),
    "AdamW(foreach=True)": partial(torch.optim.AdamW, lr=0.01, eps=1e-3, foreach=True),
    "AdamW(fused=True)": partial(torch.optim.AdamW, lr=0.01, eps=1e-3, fused=True),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "Adamax": partial(torch.optim.Adamax, lr=0.01, eps=1e-3),
    "ASGD": torch.optim.ASGD,
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=4),
    "Muon": partial(torch.optim.Muon, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01, eps=1e-3),
    "RAdam": partial(torch.optim.RAdam, lr=0.01, eps=1e-3),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, eps=1e-3),
    "Rprop": torch.optim.Rprop,
}


def _optimized(name: str, world: World) -> Seen:
    model = world.model()
    # Muon takes matrices only.
    parameters = [p for p in model.parameters() if name != "Muon" or p.ndim == 2]
    optimizer = OPTIMIZERS[name](parameters)
    for _ in range(2):

        def closure() -> Any:
            optimizer.zero_grad()
            loss = model.loss(ids())
            loss.backward()
            return loss

        optimizer.step(closure)
    return world.whole(model.embed), model.mix.weight


def optimizer_cases() -> list[Case]:
    return [
        Case(
            f"optimizer_{name}",
            "Optimizers",
            f"Train by `torch.optim.{name}`",
            partial(_optimized, name),
        )
        for name in OPTIMIZERS
    ]


def sparse_adam(world: World) -> Seen:
    """Train by `torch.optim.SparseAdam`, with `sparse=True`"""
    embed = world.embedding(sparse=True)
    optimizer = torch.optim.SparseAdam(embed.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        embed(ids()).square().sum().backward()
        optimizer.step()
    return (world.whole(embed),)


def grad_scaler(world: World) -> Seen:
    """Scale the loss by `torch.amp.GradScaler`, with an infinite gradient in one row"""
    model = world.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, 3e38, 1.0):
        optimizer.zero_grad()
        # The gradient of id 6 alone overflows.
        loss = model.loss(ids()[1:]) + (model.embed(torch.tensor([6])) * factor).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return world.whole(model.embed), model.mix.weight, torch.tensor(scaler.get_scale())


def averaged_model(world: World) -> Seen:
    """Average weights: `torch.optim.swa_utils.AveragedModel`"""
    model = world.model()
    average = AveragedModel(model)
    with torch.no_grad():
        model.embed.weight.mul_(3)
    average.update_parameters(model)
    average.update_parameters(model)
    return (world.whole(average.module.embed),)


def compiled(world: World) -> Seen:
    """Compile: `torch.compile(fullgraph=True)`"""
    model = world.model()
    loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True)(ids())
    loss.backward()
    torch._dynamo.reset()
    return loss, world.whole(model.embed, model.embed.weight.grad)


def exported(world: World) -> Seen:
    """Export: `torch.export.export`"""
    model = world.model()
    return (torch.export.export(model, (ids(),)).module()(ids()),)


def traced(world: World) -> Seen:
    """Trace: `torch.jit.trace`"""
    return (torch.jit.trace(world.embedding(), (ids(),))(ids().flip(0)),)


def scripted(world: World) -> Seen:
    """Script: `torch.jit.script`"""
    return (torch.jit.script(world.embedding())(ids()),)


def symbolically_traced(world: World) -> Seen:
    """Trace symbols: `torch.fx.symbolic_trace`"""
    return (torch.fx.symbolic_trace(world.model())(ids()),)


def made_fx(world: World) -> Seen:
    """Trace operators: `make_fx`"""
    embed = world.embedding()

    def rows(weight, x):
        return torch.func.functional_call(embed, {"weight": weight}, (x,))

    weight = embed.weight.detach()
    return (make_fx(rows)(weight, ids())(weight, ids().flip(0)),)


def fake_tensors(world: World) -> Seen:
    """Run on fake tensors: `FakeTensorMode`"""
    model = world.model()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = model(mode.from_tensor(ids()))
    return (torch.tensor(output.shape),)


def meta_device(world: World) -> Seen:
    """Run on `meta`"""
    model = world.model().to("meta")
    return (torch.tensor(model(ids().to("meta")).shape),)


def parametrized(world: World) -> Seen:
    """Parametrize the weight: `torch.nn.utils.parametrize`"""

    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    embed = world.embedding()
    parametrize.register_parametrization(embed, "weight", Double())
    return (embed(ids()),)


def pruned(world: World) -> Seen:
    """Prune the weight by size: `prune.l1_unstructured`"""
    embed = world.embedding()
    prune.l1_unstructured(embed, "weight", 0.4)
    return (embed(ids()),)


def weight_norm(world: World) -> Seen:
    """Normalise the weight: `parametrizations.weight_norm`"""
    embed = world.embedding()
    nn.utils.parametrizations.weight_norm(embed)
    return (embed(ids()),)


def sequential(world: World) -> Seen:
    """Put the layer into `nn.Sequential` and other containers"""
    model = nn.Sequential(world.embedding(), nn.Tanh())
    return (copy.deepcopy(model)(ids()),)


def tied_by_assignment(world: World) -> Seen:
    """Tie a head by assignment after sharding: `head.weight = embed.weight`"""
    embed, head = world.embedding(), nn.Linear(5, 7, bias=False)
    head.weight = embed.weight
    return (head(embed(ids())),)


def functional_tie(world: World) -> Seen:
    """Tie a head in the forward, and shard the model: `F.linear(x, self.embed.weight)`"""

    class Tied(Model):
        def forward(self, x):
            return nn.functional.linear(self.mix(self.embed(x)), self.embed.weight)

    embed = World("torch").embedding()
    model = Tied(embed, None)
    return (world.shard(model)(ids()),)
