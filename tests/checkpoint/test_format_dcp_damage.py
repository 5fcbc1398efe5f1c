"""Checkpoints of `torch.distributed.checkpoint` that are damaged, hostile or stored otherwise."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_models import TO_PT, E, assert_same_training, forms, save, train_model
from tp_embed.checkpoint import convert
from tp_embed.checkpoint.contents import ReadOptions
from tp_embed.checkpoint.errors import CheckpointError, UnsafeCheckpointError


@pytest.fixture(scope="module")
def trained():
    return train_model()


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
