"""Checkpoints of `torch.distributed.checkpoint`: what torch writes is read."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from dcp_models import (
    TO_PT,
    Model,
    assert_model,
    assert_same_training,
    cut,
    forms,
    optimizer_of,
    save,
    train,
    train_model,
)
from tp_embed.checkpoint import convert, plan
from tp_embed.checkpoint.contents import Key
from tp_embed.checkpoint.formats.dcp import files as dcp_files
from tp_embed.checkpoint.formats.dcp import metadata as dcp_metadata


@pytest.fixture(scope="module")
def trained():
    return train_model()


@pytest.mark.parametrize("form", ["nested", "optim", "app", "by index", "flat", "all flat"])
def test_what_torch_saves_is_read(trained, tmp_path, form):
    source = save(forms(*trained)[form], tmp_path / "source")
    plan = convert(source, tmp_path / "out.pt", TO_PT, verify=True)
    assert_same_training(tmp_path / "out.pt", *trained)
    assert plan.source.step == (2 if form in ("nested", "flat") else None)
    assert plan.source.tp_size == 1
    assert plan.source.cuts == {}


def test_a_state_dict_alone_is_read(trained, tmp_path):
    model = trained[0]
    source = save(model.state_dict(), tmp_path / "source", thread_count=3)
    convert(source, tmp_path / "out.pt", TO_PT)
    assert_model(tmp_path / "out.pt", model)


def test_an_optimizer_without_state_is_read(tmp_path):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    source = save({"model": weights, "optimizer": state}, tmp_path / "source")
    found = convert(source, tmp_path / "out.pt", TO_PT).source.optimizer
    assert [group["lr"] for group in found.groups] == [0.5]
    assert found.steps == {}


def dtensors(gang, path, placements):
    """Saves a model with each Parameter cut, unevenly, over a gang."""
    group = gang.as_process_group()
    mesh = DeviceMesh.from_group(group, "cpu")
    model = Model()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    weights = {key: cut(mesh, value, placements) for key, value in weights.items()}
    for own in state["state"].values():
        for key in own:
            own[key] = cut(mesh, own[key], placements)
    dcp.save(
        {"model": weights, "optimizer": state, "step": 2}, checkpoint_id=path, process_group=group
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1), Shard(0)), (Shard(1),)])
def test_shards_of_several_ranks_are_joined(pool, trained, tmp_path, placements, size):
    pool(size, dtensors, str(tmp_path / "source"), placements)
    assert len(list((tmp_path / "source").glob("*.distcp"))) == size
    convert(tmp_path / "source", tmp_path / "out.pt", TO_PT, verify=True)
    assert_same_training(tmp_path / "out.pt", *trained)


def test_what_is_no_tensor_is_noted(trained, tmp_path):
    content = forms(*trained)["nested"]
    content["model"]["_extra_state"] = "text"
    content["optimizer"]["state"]["mix.bias"]["rows"] = torch.ones(3, 3)
    found = plan(save(content, tmp_path / "source"), TO_PT).source
    assert Key("mix.bias", "rows") not in found.tensors
    notes = "; ".join(found.notes)
    assert "`_extra_state` is no tensor" in notes
    assert "`rows` of `mix.bias`" in notes
    assert "schedule" in notes


def test_chunks_of_one_form_are_parsed_once(tmp_path):
    save({str(i): torch.full((3, 4), float(i)) for i in range(200)}, tmp_path / "source")
    files = dcp_files.Files(tmp_path / "source")
    items, _ = dcp_metadata.read(tmp_path / "source" / ".metadata")
    for name, item in items.items():
        assert torch.equal(files.tensor(name, item).load(), torch.full((3, 4), float(name)))
    assert [len(forms) for forms in files._forms.values()] == [1]
