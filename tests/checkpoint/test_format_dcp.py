"""Checkpoints of `torch.distributed.checkpoint`: we read torch's, and plain torch loads ours, in
one process and in several."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tp_embed.checkpoint import Request, convert, plan
from tp_embed.checkpoint.contents import Key, ReadOptions
from tp_embed.checkpoint.errors import CheckpointError, UnsafeCheckpointError
from tp_embed.checkpoint.formats.dcp import files as dcp_files
from tp_embed.checkpoint.formats.dcp import metadata as dcp_metadata

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


@pytest.fixture(scope="module")
def trained():
    model = Model()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    return model, optimizer


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


def cut(mesh, tensor, placements):
    placement = next((p for p in placements if p.dim < tensor.dim()), Replicate())
    return distribute_tensor(tensor.detach(), mesh, [placement])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1), Shard(0)), (Shard(1),)])
def test_shards_of_several_ranks_are_joined(pool, trained, tmp_path, placements, size):
    pool(size, dtensors, str(tmp_path / "source"), placements)
    assert len(list((tmp_path / "source").glob("*.distcp"))) == size
    convert(tmp_path / "source", tmp_path / "out.pt", TO_PT, verify=True)
    assert_same_training(tmp_path / "out.pt", *trained)


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


class Bad:
    """Runs code when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refused(source, tmp_path, match, error=CheckpointError, **kwargs):
    """Asserts that a conversion fails and leaves nothing."""
    before = set(tmp_path.iterdir())
    options = replace(TO_PT, read=ReadOptions(**kwargs))
    with pytest.raises(error, match=match):
        convert(source, tmp_path / "bad.pt", options)
    assert set(tmp_path.iterdir()) == before


def edited(source, edit):
    """Changes the metadata with `edit`."""
    path = source / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata = edit(metadata) or metadata
    path.write_bytes(pickle.dumps(metadata))


@pytest.fixture
def source(trained, tmp_path):
    return save(forms(*trained)["nested"], tmp_path / "source")


def test_metadata_runs_no_code(source, tmp_path):
    ran = tmp_path / "ran"

    def edit(metadata):
        metadata.planner_data["x"] = [Bad(f"touch {ran}"), getattr]

    edited(source, edit)
    refused(source, tmp_path, r"builtins\.getattr.*posix\.system", UnsafeCheckpointError)
    assert not ran.exists()
    convert(source, tmp_path / "out.pt", replace(TO_PT, read=ReadOptions(allow_unsafe_pickle=True)))
    assert ran.exists()


def test_values_run_no_code(trained, tmp_path):
    ran = tmp_path / "ran"
    content = forms(*trained)["nested"]
    content["step"] = Bad(f"touch {ran}")
    source = save(content, tmp_path / "source")
    refused(source, tmp_path, r"posix\.system", UnsafeCheckpointError)
    assert not ran.exists()


FIRST = MetadataIndex("model.embed.weight", (0, 0))


def entry(name, value):
    """Returns an edit of the place of `embed.weight`."""

    def edit(metadata):
        setattr(metadata.storage_data[FIRST], name, value)

    return edit


def tensor(name, value):
    """Returns an edit of the item `embed.weight`."""

    def edit(metadata):
        item = metadata.state_dict_metadata["model.embed.weight"]
        setattr(item if name in ("size", "chunks", "properties") else item.chunks[0], name, value)

    return edit


def two_chunks(first, second):
    def edit(metadata):
        item = metadata.state_dict_metadata["model.embed.weight"]
        chunk = item.chunks[0]
        item.chunks = [replace(chunk, offsets=torch.Size(start)) for start in (first, second)]
        for start in (first, second):
            metadata.storage_data[MetadataIndex("model.embed.weight", start)] = (
                metadata.storage_data[FIRST]
            )

    return edit


def remove(metadata):
    del metadata.storage_data[FIRST]


def nest(keys):
    def edit(metadata):
        metadata.planner_data["model.embed.weight"] = keys

    return edit


def put(name, value):
    return lambda metadata: setattr(metadata, name, value)


def share(metadata):
    """Gives a tensor the place of another one with the same size."""
    other = metadata.storage_data[MetadataIndex("model.mix.weight", (0, 0))]
    metadata.storage_data[FIRST] = other


DAMAGES = {
    "longer than the file": (entry("length", 10**9), "It is truncated"),
    "beyond the file": (entry("offset", 10**9), "It is truncated"),
    "at a negative offset": (entry("offset", -1), "It is truncated"),
    "no length": (entry("length", 0), "It is truncated"),
    "inside of another": (entry("offset", 100), r"must be a file that `torch\.save\(\)`"),
    "length of another type": (entry("length", 2.5), "must say of each item the file"),
    "no such file": (entry("relative_path", "__9_0.distcp"), "there is no such file"),
    "path of another type": (entry("relative_path", 3), "must say of each item the file"),
    "place is missing": (remove, "must say where `model.embed.weight`"),
    "another shape": (share, r"must be of shape \(11, 6\)"),
    "a size that is larger": (tensor("size", torch.Size([99, 6])), "must cover each"),
    "an absurd size": (tensor("size", torch.Size([2**62, 2**40])), "must cover each"),
    "a size of another type": (tensor("size", "large"), "must give `model.embed.weight` a dtype"),
    "a negative size": (tensor("size", torch.Size([-11, 6])), "must give `model.embed.weight`"),
    "properties of another type": (tensor("properties", 5), "must give `model.embed.weight`"),
    "chunks of another type": (tensor("chunks", [5]), "must give `model.embed.weight`"),
    "no chunks": (tensor("chunks", []), "must cover each"),
    "chunk of other dimensions": (tensor("sizes", torch.Size([66])), "must give `model.embed"),
    "chunk of another shape": (tensor("sizes", torch.Size([6, 11])), r"must be of shape \(6, 11\)"),
    "overlapping chunks": (two_chunks((0, 0), (5, 0)), "`embed.weight` in .* damaged"),
    "a gap": (two_chunks((0, 0), (11, 6)), "`embed.weight` in .* damaged"),
    "keys of another type": (nest(5), "must say which keys lead"),
    "keys of other types": (nest((1.5, None)), "must say which keys lead"),
    "very many keys": (nest(("model",) * 5000), "must say which keys lead"),
    "keys of another item": (nest(("model", "mix.bias")), "collides with another"),
    "keys below another item": (nest(("model", "mix.bias", "x")), "collides with another"),
    "storage of another type": (put("storage_data", [1]), "must hold the metadata"),
    "storage of other items": (put("storage_data", {1: 2}), "must say of each item the file"),
    "items of another type": (put("state_dict_metadata", None), "must hold the metadata"),
    "items without names": (put("state_dict_metadata", {1: 2}), "must name items by strings"),
    "items of no type": (put("state_dict_metadata", {"a": 2}), "must give `a` a dtype"),
    "no items": (put("state_dict_metadata", {}), "must hold a state dict"),
    "something else": (lambda metadata: [1, 2], "must hold the metadata"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metadata_is_refused(source, tmp_path, damage):
    edit, match = DAMAGES[damage]
    edited(source, edit)
    refused(source, tmp_path, match)


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "a/../../b"])
def test_files_elsewhere_are_refused(source, tmp_path, name):
    edited(source, entry("relative_path", name))
    refused(source, tmp_path, "must name files within", UnsafeCheckpointError)


@pytest.mark.parametrize("size", [0, 1, 100, 3000])
def test_truncated_metadata_is_refused(source, tmp_path, size):
    data = (source / ".metadata").read_bytes()
    (source / ".metadata").write_bytes(data[:size])
    refused(source, tmp_path, "Copy it again")


@pytest.mark.parametrize("opcodes", [b"]r\xff\xff\xff\xff.", b"]p99999999999\n.", b"]p-1\n."])
def test_metadata_takes_no_memory_that_it_does_not_fill(source, tmp_path, opcodes):
    (source / ".metadata").write_bytes(b"\x80\x04" + opcodes)
    refused(source, tmp_path, "the memo has no")


def test_missing_and_truncated_files_are_refused(source, tmp_path):
    (file,) = source.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 2000)
    refused(source, tmp_path, "It is truncated")
    file.unlink()
    refused(source, tmp_path, "there is no such file")
    (source / ".metadata").unlink()
    refused(source, tmp_path, r"must hold `\.metadata`")


def change(form, keys, value):
    """Returns a form with one entry changed."""

    def content(model, optimizer):
        root = node = copy.deepcopy(forms(model, optimizer)[form])
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        return root

    return content


STATE = ("optimizer", "state", "mix.bias")
GROUP = ("optimizer", "param_groups", 0)
WRONG = {
    "a step of text": (change("nested", ("step",), "two"), "`step` .* must be a number"),
    "an infinite step": (change("nested", ("step",), float("inf")), "must be a number"),
    "a large step": (change("nested", ("step",), torch.ones(2000)), "must be small"),
    "a step of a Parameter": (change("nested", (*STATE, "step"), [1]), "the step of mix.bias"),
    "a state of text": (change("nested", STATE, "text"), "a dict of optimizer states"),
    "a state of nothing": (change("nested", ("optimizer", "state", "x"), {"a": 1}), r"\['x'\]"),
    "params of text": (change("nested", (*GROUP, "params"), "text"), "must be a list of dicts"),
    "unknown params": (change("nested", (*GROUP, "params"), ["no"]), "have Parameters of"),
    "params twice": (change("nested", (*GROUP, "params"), ["mix.bias"]), "each once"),
    "groups of text": (change("nested", GROUP[:2], "text"), "must be a list of dicts"),
    "no names": (change("by index", (*GROUP, "param_names"), 5), "--optimizer-names"),
    "few names": (change("by index", (*GROUP, "param_names"), ["a"]), "--optimizer-names"),
    "a state called weight": (change("nested", (*STATE, "weight"), torch.ones(E)), "mix.bias"),
    "names of buffers": (change("nested", ("buffer_names",), 5), "must be a list of names"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_types_in_what_was_saved_are_refused(trained, tmp_path, wrong):
    content, match = WRONG[wrong]
    refused(save(content(*trained), tmp_path / "source"), tmp_path, match)


def test_names_of_an_optimizer_can_be_given(trained, tmp_path):
    content = forms(*trained)["by index"]
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in content["optimizer"]["param_groups"]
    ]
    content["optimizer"] = {**content["optimizer"], "param_groups": groups}
    source = save(content, tmp_path / "source")
    refused(source, tmp_path, "--optimizer-names")
    names = ("embed.weight", "other.weight", "mix.weight", "mix.bias")
    options = replace(TO_PT, read=ReadOptions(optimizer_names=names))
    convert(source, tmp_path / "out.pt", options)
    assert_same_training(tmp_path / "out.pt", *trained)


class Reversible(StreamTransformExtension):
    """Stands in for a compressing transform."""

    @staticmethod
    def from_descriptor(version):
        return Reversible()

    @staticmethod
    def registry_name():
        return "reversible"

    def get_descriptor(self):
        return "reversible/1"

    def transform_to(self, output):
        return output

    def transform_from(self, input):
        return input


def test_other_ways_to_store_are_refused(trained, tmp_path):
    weights = {key: value.clone() for key, value in trained[0].state_dict().items()}
    source = save(weights, tmp_path / "zipped", _extensions=[Reversible()])
    refused(source, tmp_path, "are transformed by")
    source = save(weights, tmp_path / "other", serialization_format=SerializationFormat.SAFETENSORS)
    refused(source, tmp_path, "SerializationFormat.TORCH_SAVE")


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


def test_chunks_of_one_form_are_parsed_once(tmp_path):
    save({str(i): torch.full((3, 4), float(i)) for i in range(200)}, tmp_path / "source")
    files = dcp_files.Files(tmp_path / "source")
    items, _ = dcp_metadata.read(tmp_path / "source" / ".metadata")
    for name, item in items.items():
        assert torch.equal(files.tensor(name, item).load(), torch.full((3, 4), float(name)))
    assert [len(forms) for forms in files._forms.values()] == [1]
