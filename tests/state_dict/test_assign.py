"""Loading with ``assign=True``: shards own their memory, and attributes of Parameters stay."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from tp_embed import OutputHead, shard_embeddings
from tp_embed.checkpoint import hook_state_dict


class Tied(nn.Module):
    def __init__(self, num_rows=12, width=6, device=None):
        super().__init__()
        self.embed = nn.Embedding(num_rows, width, device=device)
        self.head = nn.Linear(width, num_rows, bias=False, device=device)
        self.head.weight = self.embed.weight


def state_of(gang, form):
    """Builds a state dict: whole, with a second key for the tie, or as DTensors over columns."""
    torch.manual_seed(1)
    table = torch.randn(12, 6)
    if form == "bf16":
        table = table.bfloat16()
    value = table
    if form == "dtensor":
        mesh = DeviceMesh.from_group(gang.as_process_group(), "cpu")
        value = distribute_tensor(table.clone(), mesh, [Shard(1)])
    if form == "parameter":
        value = nn.Parameter(table)
    return {"embed.weight": value, "head.weight": value}, table.clone()


def assign(gang, strategy, form, device):
    model = Tied(device=device)
    shard_embeddings(model, gang, strategy=strategy)
    model.embed.weight.requires_grad_(False)
    kind = type(model.embed.weight)
    state, table = state_of(gang, form)
    values = [weakref.ref(value) for value in state.values()]
    with hook_state_dict(model):
        model.load_state_dict(state, assign=True)
    weight = model.embed.weight
    rows, columns = model.embed.rows, model.embed.columns
    own = table[rows.start : rows.stop, columns.start : columns.stop]
    assert torch.equal(weight.detach(), own)
    assert weight.dtype == table.dtype
    assert type(weight) is kind
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert isinstance(model.head, OutputHead)
    assert torch.equal(model.head.weight.detach(), own)
    # As in torch: tied tensors share memory, and tied Parameters stay one.
    assert model.head.weight.data_ptr() == weight.data_ptr()
    assert (model.head.weight is weight) == (form == "parameter")
    if gang.size > 1:
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert weight.is_contiguous()
        del state
        gc.collect()
        assert [value() for value in values] == [None, None]
    with hook_state_dict(model, "full"):
        assert torch.equal(model.state_dict()["embed.weight"], table)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("form", ["fp32", "bf16", "parameter", "dtensor"])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_assigned_shards(pool, size, strategy, form, device):
    pool(size, assign, strategy, form, device)


def refuse(gang, strategy):
    model = Tied()
    shard_embeddings(model, gang, strategy=strategy)
    weight = model.embed.weight
    values = weight.detach().clone()
    with hook_state_dict(model), pytest.raises(RuntimeError, match="must have the shape"):
        model.load_state_dict({"embed.weight": torch.zeros(5, 5)}, assign=True, strict=False)
    assert model.embed.weight is weight
    assert model.head.weight is weight
    assert torch.equal(weight.detach(), values)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_refused_table_leaves_the_parameter(pool, strategy):
    pool(2, refuse, strategy)


def step_after(gang, strategy, swap):
    """Checks that training continues like the unsharded model's."""
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        whole, model = Tied(), Tied()
        shard_embeddings(model, gang, strategy=strategy)
        state, _ = state_of(gang, "fp32")
        whole.load_state_dict({k: v.clone() for k, v in state.items()}, assign=not swap)
        with hook_state_dict(model):
            model.load_state_dict(state, assign=not swap)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if not swap:  # Assigning breaks ties, as in torch.
        whole.head.weight, model.head.weight = whole.embed.weight, model.embed.weight
    for each in (whole, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        ids = torch.tensor([[1, 1, 7], [11, 0, 3]])
        for _ in range(3):
            each.head(each.embed(ids)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    with hook_state_dict(model, "full"):
        table = model.state_dict()["embed.weight"]
    torch.testing.assert_close(table, whole.embed.weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_training_goes_on(pool, size, strategy, swap):
    pool(size, step_after, strategy, swap)
