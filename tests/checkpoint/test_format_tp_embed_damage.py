"""Directories of tp_embed that are damaged or hostile: each is an error, and nothing is left."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_embed.checkpoint import CheckpointError, ReadOptions, UnsafeCheckpointError, convert, read
from tp_embed_directories import E, file_of, request, save, trained, write_two_ranks


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    return write_two_ranks(save(directory / "model.pt", *trained()), directory / "written")


@pytest.fixture
def damaged(written, tmp_path):
    return shutil.copytree(written, tmp_path / "damaged")


def sign(path):
    """Updates sizes and hashes in the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def assert_refused(path, message, error=CheckpointError):
    output = path.with_name("output")
    with pytest.raises(CheckpointError, match=message) as raised:
        convert(path, output, request(tp_size=1))
    assert type(raised.value) is error
    assert not list(path.parent.glob("*output*"))


def test_a_replicated_parameter_that_differs_is_refused(damaged):
    file = file_of(damaged, 1, 2)
    state = load_file(file)
    state["norm.weight"][2] += 1
    save_file(state, file, metadata={"head.weight": "embed.weight"})
    sign(damaged)
    read(damaged, ReadOptions())
    assert_refused(damaged, "`norm.weight` must be the same on every rank, but")


def test_each_flipped_byte_is_found(damaged):
    file = file_of(damaged, 1, 2)
    data = file.read_bytes()
    for place in {*range(0, len(data), 97), len(data) - 1}:
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(CheckpointError):
            convert(damaged, damaged.with_name("output.pt"), request())
    assert_refused(damaged, "must have the SHA-256 .*rank-00001|rank-00001.* must have the SHA-256")


def test_damaged_files_are_refused(damaged):
    first, second = (file_of(damaged, rank, 2) for rank in (0, 1))
    data = second.read_bytes()
    second.write_bytes(data[:-1])
    assert_refused(damaged, "rank-00001.* must have .* bytes, as .* says, but has .* truncated")
    sign(damaged)
    assert_refused(damaged, "rank-00001.* damaged")
    second.unlink()
    assert_refused(damaged, "names `rank-00001-of-00002.safetensors`, but there is no such file")
    shutil.copy(first, second)
    sign(damaged)
    assert_refused(damaged, "must have the shape and dtype .*5, 6.* but has .*6, 6")
    for change in ({"more": torch.zeros(1)}, {"norm.weight": torch.zeros(E).half()}):
        second.write_bytes(data)
        save_file(load_file(second) | change, second, metadata={"head.weight": "embed.weight"})
        sign(damaged)
        assert_refused(damaged, f"`{next(iter(change))}` in .* must have the shape and dtype")
    save_file(load_file(second), second)
    sign(damaged)
    assert_refused(damaged, "must be the ties")
    second.write_bytes(data)
    (damaged / "manifest.json").unlink()
    assert_refused(damaged, "must have a `manifest.json`")


PART = ("tensors", "embed.weight", "partition")
RANGES = (*PART, "ranges")
GROUP = ("optimizer", "groups", 0)
DELETE = object()
DEEP = json.loads("[" * 900 + "]" * 900)
BAD = [
    (("format",), "other", "must be of the format `tp-embed`"),
    (("version",), 3, "must have version 2 .* but has 3 instead. Update"),
    (("version",), True, "with a version"),
    (("version",), DELETE, "with a version"),
    (("more",), 1, "an object with the keys"),
    (("ties",), DELETE, "an object with the keys"),
    (("tp_size",), 3, "must be the files of 3 ranks|of 3 ranks"),
    (("tp_size",), 10**30, "ranks"),
    (("tp_size",), "2", "`tp_size` .* must be a number"),
    (("tp_size",), 0, "`tp_size` .* must be a number"),
    (("step",), 1.5, "`step` .* must be a number"),
    (("step",), DEEP, "nested|must be a number"),
    (("files",), [], "`files` .* must be an object"),
    (("files",), {}, "must be the files of 2 ranks"),
    (("files", "rank-00001-of-00002.safetensors"), DELETE, "must be the files of 2 ranks"),
    (("files", "rank-00001-of-00002.safetensors"), 5, "must be a size and a SHA-256"),
    (("files", "rank-00001-of-00002.safetensors", "size"), "5", "must be a size and a SHA-256"),
    (("files", "rank-00001-of-00002.safetensors", "size"), 10**30, "must have 10{30} bytes"),
    (("files", "rank-00001-of-00002.safetensors", "sha256"), "0" * 64, "SHA-256 000"),
    (("files", "rank-00002-of-00003.safetensors"), {}, "there is no such file"),
    (("tensors",), [], "`tensors` .* must be an object"),
    (("tensors", "norm.bias"), DELETE, "names .* must be names of Parameters"),
    (("tensors", "positions"), DELETE, "`positions` in .* but has .*int64"),
    (("tensors", ""), "norm.bias", "must be an object with a shape"),
    (("tensors", "norm.bias"), None, "must be an object with a shape"),
    (("tensors", "norm.bias", "buffer"), 0, "must be an object with a shape"),
    (("tensors", "norm.bias", "more"), 0, "an object with the keys"),
    (("tensors", "norm.bias", "shape"), [E + 1], "must have the shape and dtype"),
    (("tensors", "norm.bias", "shape"), [-1], "shape .* must be a list of sizes"),
    (("tensors", "norm.bias", "shape"), [0, 2**62], "shape .* must be a list of sizes"),
    (("tensors", "norm.bias", "shape"), [True], "shape .* must be a list of sizes"),
    (("tensors", "norm.bias", "shape"), 6, "shape .* must be a list of sizes"),
    (("tensors", "norm.bias", "dtypes", "weight"), "float16", "must have the shape and dtype"),
    (("tensors", "norm.bias", "dtypes", "weight"), "nn", "dtype must be one of torch"),
    (("tensors", "norm.bias", "dtypes", "weight"), [1], "dtype must be one of torch"),
    (("tensors", "norm.bias", "dtypes", "weight"), DELETE, "`weight` or `fp32`"),
    (("tensors", "norm.bias", "dtypes", "a/b"), "float32", "`weight` or `fp32`"),
    (("tensors", "norm.bias", "partition"), None, "must be a dimension and ranges"),
    (("tensors", "norm.bias", "partition"), "cut", "must be a dimension and ranges"),
    (("tensors", "norm.bias", "shapes"), {"weight": [1]}, "for states by row, or numbers"),
    (("tensors", "norm.bias", "shapes"), {"decay": []}, "for states by row, or numbers"),
    (("tensors", "norm.bias", "shapes"), [], "must be an object"),
    ((*PART, "dim"), 2, "must be a dimension and ranges"),
    ((*PART, "dim"), -1, "must be a dimension and ranges"),
    ((*PART, "dim"), True, "must be ranges"),
    ((*PART, "more"), 0, "an object with the keys"),
    (RANGES, [[[0, 6]], [[6, 11]], []], "must be ranges .start, stop. of 2 ranks"),
    (RANGES, [[[0, 6]], 5], "must be ranges .start, stop. of 2 ranks"),
    (RANGES, [[[0, 6]], [[6, 11, 12]]], "must be ranges .start, stop. of 2 ranks"),
    (RANGES, [[[0, 6]], [[6, 11.0]]], "must be ranges .start, stop. of 2 ranks"),
    (RANGES, [[[0, 6]], [[11, 6]]], "must be ranges .start, stop. of 2 ranks"),
    (RANGES, [[[0, 6]], [[6, 2**70]]], "must be ranges .start, stop. of 2 ranks"),
    (RANGES, [[[0, 6]], [[5, 11]]], "must be ranges with each index below 11 once"),
    (RANGES, [[[0, 5]], [[6, 11]]], "must be ranges with each index below 11 once"),
    (RANGES, [[[0, 6]], [[6, 10]]], "must be ranges with each index below 11 once"),
    (RANGES, [[[0, 5]], [[5, 11]]], "must have the shape and dtype"),
    (PART, "replicated", "must have the shape and dtype"),
    (("ties",), ["head.weight"], "must be other names"),
    (("ties", "head.weight"), "nothing", "must be other names"),
    (("ties", "norm.bias"), "norm.weight", "must be other names"),
    (("ties",), {}, "must be the ties"),
    (("optimizer",), [], "must be null, or an object"),
    (("optimizer", "more"), 1, "must be null, or an object"),
    (("optimizer", "steps", "norm.bias"), "3", "the step of `norm.bias`|step of"),
    (("optimizer", "steps", "nothing"), 3, "must be names of Parameters"),
    (GROUP, [], "must be an object with `params`"),
    ((*GROUP, "params"), 5, "must be an object with `params`"),
    ((*GROUP, "params"), [["norm.bias"]], "must be names, each in one group"),
    ((*GROUP, "params"), ["norm.bias"], "must be names, each in one group"),
    ((*GROUP, "lr"), math.nan, "must be of finite numbers"),
    ((*GROUP, "lr"), {"$float": "1"}, "must be a float, a tuple or a dict"),
    ((*GROUP, "lr"), {"$tuple": [], "x": 1}, "must be a float, a tuple or a dict"),
    ((*GROUP, "lr"), {"$dict": [[[], 1]]}, "must be a float, a tuple or a dict"),
    ((*GROUP, "lr"), {"$dict": [["a", 1], ["a", 2]]}, "must be a float, a tuple or a dict"),
    (("extra",), [], "`extra` .* must be an object"),
    (("extra", "deep"), DEEP, "nested"),
]


@pytest.mark.parametrize(("where", "value", "message"), BAD)
def test_bad_manifests_are_refused(damaged, where, value, message):
    manifest = json.loads((damaged / "manifest.json").read_text())
    parent = manifest
    for key in where[:-1]:
        parent = parent[key]
    if value is DELETE:
        del parent[where[-1]]
    else:
        parent[where[-1]] = value
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(damaged, message)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_files_elsewhere_are_not_read(damaged, name):
    shutil.copy(file_of(damaged, 1, 2), damaged.with_name("secret"))
    text = (damaged / "manifest.json").read_text()
    (damaged / "manifest.json").write_text(text.replace("rank-00001-of-00002.safetensors", name))
    assert_refused(damaged, "must name files within", UnsafeCheckpointError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[]", "must hold a JSON object"),
        ("\xff", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ('{"format": "tp-embed", "version": 1, "version": 1}', "must not have a key twice"),
    ],
)
def test_what_is_no_manifest_is_refused(damaged, text, message):
    (damaged / "manifest.json").write_text(text, encoding="latin-1")
    assert_refused(damaged, message)


def test_every_truncated_manifest_is_refused(damaged):
    text = (damaged / "manifest.json").read_text().rstrip()
    for size in range(0, len(text), 211):
        (damaged / "manifest.json").write_text(text[:size])
        with pytest.raises(CheckpointError):
            convert(damaged, damaged.with_name("output.pt"), request())
