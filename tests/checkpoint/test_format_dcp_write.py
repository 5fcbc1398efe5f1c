"""Checkpoints of `torch.distributed.checkpoint` that we write: plain torch loads them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dcp_models import (
    TO_DCP,
    TO_PT,
    E,
    Model,
    assert_model,
    assert_trains_alike,
    cut,
    optimizer_of,
    save,
    train,
    train_model,
)
from tp_embed.checkpoint import convert, plan
from tp_embed.checkpoint.formats.dcp import files as dcp_files


@pytest.fixture(scope="module")
def trained():
    return train_model()


@pytest.fixture
def pt(trained, tmp_path):
    """Converts to a file of `torch.save()`, to check what we wrote."""
    model, optimizer = trained
    path = tmp_path / "whole.pt"
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": 2,
            "buffer_names": ["scale"],
        },
        path,
    )
    return path


def load(path, group=None, mesh=None):
    """Loads into another model and optimizer with plain torch, as DTensors if given a mesh."""
    model = Model(seed=1)
    optimizer = optimizer_of(model)
    weights, state = get_state_dict(model, optimizer)
    weights = {key: value.clone() for key, value in weights.items()}
    if mesh is not None:
        weights = {key: cut(mesh, value, [Shard(0)]) for key, value in weights.items()}
        for own in state["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                own[key] = cut(mesh, own[key], [Shard(1), Shard(0)])
    root = {"model": weights, "optimizer": state, "step": None}
    dcp.load(root, checkpoint_id=path, process_group=group, no_dist=group is None)
    assert root["step"] == 2
    for own in [weights, *state["state"].values()]:
        for key, value in own.items():
            own[key] = value.full_tensor() if isinstance(value, DTensor) else value
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return model, optimizer


def test_plain_torch_loads_it_in_one_process(pt, trained, tmp_path):
    convert(pt, tmp_path / "out", TO_DCP, verify=True)
    assert_trains_alike(*trained, *load(tmp_path / "out"))


def load_distributed(gang, path):
    group = gang.as_process_group()
    model, optimizer = load(path, group, DeviceMesh.from_group(group, "cpu"))
    train(model, optimizer)
    return {key: value.tolist() for key, value in model.state_dict().items()}


def test_plain_torch_loads_it_in_two_processes(pool, pt, trained, tmp_path):
    convert(pt, tmp_path / "out", TO_DCP)
    model, optimizer = copy.deepcopy(trained)
    train(model, optimizer)
    expected = {key: value.tolist() for key, value in model.state_dict().items()}
    assert pool(2, load_distributed, str(tmp_path / "out")) == [expected] * 2


def test_torch_makes_one_file_of_it(pt, trained, tmp_path):
    convert(pt, tmp_path / "out", TO_DCP)
    dcp_to_torch_save(tmp_path / "out", tmp_path / "one.pt")
    assert_model(tmp_path / "one.pt", trained[0])
    root = torch.load(tmp_path / "one.pt")
    assert root["step"] == 2
    assert root["buffer_names"] == ["scale"]
    assert [group["weight_decay"] for group in root["optimizer"]["param_groups"]] == [0.0, 0.01]


def test_tied_names_have_one_place(pt, tmp_path):
    convert(pt, tmp_path / "out", TO_DCP)
    storage = FileSystemReader(tmp_path / "out").read_metadata().storage_data
    start = (0, 0)
    first, second = (
        storage[MetadataIndex(f"model.{name}.weight", start)] for name in ("embed", "head")
    )
    assert first == second
    found = plan(tmp_path / "out", TO_PT).source
    assert found.ties == {"head.weight": "embed.weight"}
    assert found.buffers == {"scale"}
    convert(tmp_path / "out", tmp_path / "back.pt", TO_PT)
    root = torch.load(tmp_path / "back.pt")["model"]
    assert root["head.weight"].data_ptr() == root["embed.weight"].data_ptr()


def test_large_tensors_are_written_in_chunks(pt, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(dcp_files, "_CHUNK_BYTES", 4 * E * 4)
    monkeypatch.setattr(dcp_files, "_FILE_BYTES", 8000)
    convert(pt, tmp_path / "out", TO_DCP, verify=True)
    metadata = FileSystemReader(tmp_path / "out").read_metadata()
    chunks = metadata.state_dict_metadata["model.embed.weight"].chunks
    assert [tuple(chunk.sizes) for chunk in chunks] == [(4, E), (4, E), (3, E)]
    assert len(list((tmp_path / "out").glob("__0_*.distcp"))) > 3
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".distcp", ""}
    assert_trains_alike(*trained, *load(tmp_path / "out"))


def test_all_dtypes_and_shapes_come_through(tmp_path):
    values = {
        "half": torch.randn(4, 5).bfloat16(),
        "eighth": torch.randn(4, 5).to(torch.float8_e4m3fn),
        "count": torch.tensor(2**60),
        "unsigned": torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
        "mask": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "columns": torch.randn(4, 6).T,
        "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 7),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    source = save(values, tmp_path / "source")
    convert(source, tmp_path / "out", replace(TO_DCP, source_format="dcp"), verify=True)
    loaded = {key: torch.zeros_like(value) for key, value in values.items()}
    dcp.load({"model": loaded}, checkpoint_id=tmp_path / "out", no_dist=True)
    for key, value in values.items():
        assert loaded[key].dtype == value.dtype
        both = (each.contiguous().view(torch.uint8) for each in (loaded[key], value))
        assert torch.equal(*both) if value.dim() else loaded[key] == value, key


def test_a_killed_run_is_resumed(pt, trained, tmp_path):
    def stop(nbytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(pt, tmp_path / "out", TO_DCP, progress=stop)
    assert not (tmp_path / "out").exists()
    laid_out = tmp_path / ".out.partial" / "out" / ".metadata"
    before = laid_out.stat()
    convert(pt, tmp_path / "out", TO_DCP, resume=True, verify=True)
    assert (tmp_path / "out" / ".metadata").stat().st_mtime_ns == before.st_mtime_ns
    assert_trains_alike(*trained, *load(tmp_path / "out"))


def test_fp32_copies_are_states(tmp_path):
    model = Model().bfloat16()
    names = [name for name, _ in model.named_parameters()]
    masters = {
        name: torch.randn_like(p, dtype=torch.float32) for name, p in model.named_parameters()
    }
    root = {
        "model": model.state_dict(),
        "optimizer": {
            "state": {i: {"fp32": masters[name], "step": 1.0} for i, name in enumerate(names)},
            "param_groups": [{"lr": 0.1, "params": list(range(len(names))), "param_names": names}],
        },
    }
    torch.save(root, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out", TO_DCP, verify=True)
    states = {name: {"fp32": torch.zeros_like(value)} for name, value in masters.items()}
    dcp.load({"optimizer": {"state": states}}, checkpoint_id=tmp_path / "out", no_dist=True)
    for name, value in masters.items():
        assert torch.equal(states[name]["fp32"], value)
