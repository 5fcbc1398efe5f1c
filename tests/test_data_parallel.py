"""Compares sharded tables under torch's data parallelism with one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tp_embed import ProcessGroupGang, shard_embeddings

V, E, STEPS = 23, 8, 3


class Model(nn.Module):
    def __init__(self, tied: bool, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, E, sparse=sparse)
        self.up = nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.up(self.embed(ids)).tanh())
        return nn.functional.cross_entropy(logits[:-1], ids[1:])

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def batches() -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (STEPS, 2, 12), generator=generator)


def train_alone(tied, sparse):
    model = Model(tied, sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in batches():
        optimizer.zero_grad()
        loss = torch.stack([model(ids) for ids in step]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(gang, way, strategy, tied, sparse):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group = mesh.get_group("dp")
    model: Any = Model(tied, sparse)
    shard_embeddings(model, ProcessGroupGang(mesh.get_group("tp"), "cpu"), strategy=strategy)
    if way == "FSDP2":
        fully_shard(model, mesh=mesh["dp"])
    else:
        options = {"DDP": {}, "DDP, views": {"gradient_as_bucket_view": True}}[way]
        model = DistributedDataParallel(model, process_group=group, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in batches():
        optimizer.zero_grad()
        try:
            loss = model(step[dist.get_rank(group)])
            loss.backward()
        except (NotImplementedError, ValueError) as e:
            return str(e)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=group)
        losses.append(mean.item() / 2)
    return losses


@pytest.mark.parametrize("way", ["DDP", "DDP, views", "FSDP2"])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_gradients_train_as_one_process(pool, way, strategy, tied):
    expected = pytest.approx(train_alone(tied, sparse=False), rel=1e-6)
    for losses in pool(4, train, way, strategy, tied, sparse=False):
        assert losses == expected


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_sparse_gradients_end_in_an_error_of_torch(pool, strategy):
    """FSDP2 supports none, not even of :class:`torch.nn.Embedding`."""
    for message in pool(4, train, "FSDP2", strategy, tied=False, sparse=True):
        assert isinstance(message, str)
        assert "Sparse" in message


@pytest.mark.parametrize("strategy", ["embed", "vocab", "none"])
def test_sparse_gradients_behind_ddp_are_those_of_torch_or_refused(pool, strategy):
    if strategy == "none":
        for losses in pool(4, train, "DDP", strategy, tied=False, sparse=True):
            assert losses == pytest.approx(train_alone(False, True), rel=1e-6)
        return
    for message in pool(4, train, "DDP", strategy, tied=False, sparse=True):
        assert "`sparse` must be False for a table behind `DistributedDataParallel`" in message
        assert "Pass `sparse=False` to `shard_embeddings()`" in message
