"""Directories of Hugging Face transformers that are damaged, hostile or unusual."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llama
from hf_directories import HEAD, INDEX, assert_same, edit, save, state_dict, to_hf, without_output
from tp_embed.checkpoint import CheckpointError, UnsafeCheckpointError


def remap(name, file):
    return lambda path: edit(path / INDEX, lambda index: index["weight_map"].update({name: file}))


def update(**values):
    return lambda path: edit(path / INDEX, lambda index: index.update(values))


def edit_header(change):
    """Changes the header of the file with the head."""

    def apply(path):
        file = path / json.loads((path / INDEX).read_text())["weight_map"][HEAD]
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def entry(**values):
    return edit_header(lambda header: header[HEAD].update(values))


def edit_bytes(change):
    def apply(path):
        file = path / json.loads((path / INDEX).read_text())["weight_map"][HEAD]
        file.write_bytes(change(file.read_bytes()))

    return apply


def repeat_a_key(path):
    text = (path / INDEX).read_text()
    (path / INDEX).write_text(text.replace(f'"{HEAD}"', f'"{HEAD}": "x", "{HEAD}"'))


def drop(name):
    return lambda path: edit(path / INDEX, lambda index: index["weight_map"].pop(name))


def put_a_tensor_into_two_files(path):
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    file = path / next(name for name in weight_map.values() if name != weight_map[HEAD])
    save_file({**load_file(file), HEAD: torch.zeros(llama.VOCAB, llama.DIM)}, file)


def give_a_file_two_names(path):
    name = json.loads((path / INDEX).read_text())["weight_map"][HEAD]
    (path / "again.safetensors").symlink_to(name)
    remap("model.norm.weight", "again.safetensors")(path)


DAMAGE = {
    "traversal": (remap(HEAD, "../x.safetensors"), "must name files within", True),
    "deep traversal": (remap(HEAD, "a/../../x"), "must name files within", True),
    "absolute": (remap(HEAD, "/etc/passwd"), "must name files within", True),
    "missing file": (remap(HEAD, "gone.safetensors"), "there is no such file", False),
    "directory": (remap(HEAD, "."), "there is no such file", False),
    "nul in a name": (remap(HEAD, "a\0b"), "must name files", False),
    "number for a file": (remap(HEAD, 3), "must have a `weight_map`", False),
    "list for a file": (remap(HEAD, ["a"]), "must have a `weight_map`", False),
    "no weight map": (lambda p: (p / INDEX).write_text("{}"), "must have a `weight_map`", False),
    "empty weight map": (update(weight_map={}), "must have a `weight_map`", False),
    "list as weight map": (update(weight_map=["a"]), "must have a `weight_map`", False),
    "list as index": (lambda p: (p / INDEX).write_text("[]"), "must hold a JSON object", False),
    "no JSON": (lambda p: (p / INDEX).write_text('{"weight_map": '), "must be JSON", False),
    "no text": (lambda p: (p / INDEX).write_bytes(b"\xff\xfe\0"), "must be JSON", False),
    "nested JSON": (lambda p: (p / INDEX).write_text("[" * 10**6), "must be JSON", False),
    "key twice": (repeat_a_key, "must not have a key twice", False),
    "key in no file": (
        lambda p: remap("ghost", json.loads((p / INDEX).read_text())["weight_map"][HEAD])(p),
        "`ghost` must be in",
        False,
    ),
    "key not in the index": (drop("model.norm.weight"), "must name all tensors, but lacks", False),
    "file not in the index": (drop(HEAD), "`total_size` in .* must be the size", False),
    "key in two files": (
        put_a_tensor_into_two_files,
        r"`lm_head.weight` must be in .* only",
        False,
    ),
    "file with two names": (give_a_file_two_names, "must be in .* only", False),
    "total size": (
        update(metadata={"total_size": 7}),
        "`total_size` in .* must be the size",
        False,
    ),
    "total size as text": (update(metadata={"total_size": "7"}), "`total_size` in", False),
    "two checkpoints": (
        lambda p: save_file({"a": torch.ones(1)}, p / "model.safetensors"),
        "must hold one checkpoint",
        False,
    ),
    "header of 2^63 bytes": (
        edit_bytes(lambda b: b"\xff" * 8 + b[8:]),
        "must be a safetensors file",
        False,
    ),
    "header of no bytes": (
        edit_bytes(lambda b: bytes(8) + b[8:]),
        "must be a safetensors file",
        False,
    ),
    "header longer than the file": (
        edit_bytes(lambda b: struct.pack("<Q", len(b)) + b[8:]),
        "must be a safetensors file",
        False,
    ),
    "empty file": (edit_bytes(lambda b: b""), "must be a safetensors file", False),
    "truncated file": (edit_bytes(lambda b: b[:-1]), "must have|is damaged", False),
    "truncated header": (edit_bytes(lambda b: b[:20]), "must be a safetensors file", False),
    "bytes at the end": (edit_bytes(lambda b: b + b"\0"), "The file is damaged", False),
    "header is no JSON": (edit_bytes(lambda b: b[:8] + b"x" + b[9:]), "must be JSON", False),
    "file of torch": (edit_bytes(lambda b: b"PK\3\4" + b[4:]), "must be a safetensors file", False),
    "overlapping offsets": (
        edit_header(lambda h: h.update({"other": {**h[HEAD]}})),
        "The file is damaged",
        False,
    ),
    "gap": (
        edit_header(lambda h: h[HEAD]["data_offsets"].__setitem__(0, 4)),
        "The file is damaged",
        False,
    ),
    "negative offsets": (entry(data_offsets=[-4, 4]), "must have a known dtype", False),
    "offsets beyond the file": (entry(data_offsets=[0, 10**18]), "The file is damaged", False),
    "absurd shape": (entry(shape=[10**12, 10**12]), "must have a known dtype", False),
    "negative shape": (entry(shape=[-1, -3636]), "must have a known dtype", False),
    "fraction in a shape": (entry(shape=[1.5, 2]), "must have a known dtype", False),
    "truth value in a shape": (entry(shape=[True, 3636]), "must have a known dtype", False),
    "unknown dtype": (entry(dtype="F31"), "must have a known dtype", False),
    "number as dtype": (entry(dtype=3), "must have a known dtype", False),
    "other dtype": (entry(dtype="F16"), "The file is damaged", False),
    "three offsets": (entry(data_offsets=[0, 1, 2]), "must have a known dtype", False),
    "text as an entry": (edit_header(lambda h: h.update({HEAD: "x"})), "known dtype", False),
    "numbers as metadata": (
        edit_header(lambda h: h.update({"__metadata__": {"a": 1}})),
        "must be strings",
        False,
    ),
    "config is no JSON": (lambda p: (p / "config.json").write_text("{"), "must be JSON", False),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "JSON object", False),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_directory_is_refused(tmp_path, saved, damage):
    apply, message, is_unsafe = DAMAGE[damage]
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(saved, source)
    save_file({HEAD: torch.zeros(2)}, tmp_path / "x.safetensors")
    apply(source)
    error = UnsafeCheckpointError if is_unsafe else CheckpointError
    with pytest.raises(error, match=message):
        to_hf(source, output)
    assert without_output(output)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path)
    return path


CONFIGS = [
    {"dtype": 3, "torch_dtype": None, "vocab_size": "x"},
    {"dtype": {"": "float32"}, "text_config": 3, "tie_word_embeddings": "yes"},
    {"text_config": [], "vision_config": None, "vocab_size": None},
    {"text_config": {"dtype": [], "vocab_size": {}, "tie_word_embeddings": 0}},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_values_of_other_types_in_a_config_are_kept(tmp_path, saved, config):
    shutil.copytree(saved, tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    to_hf(tmp_path / "source", tmp_path / "output", dtype=torch.bfloat16, vocab_size=90)
    assert json.loads((tmp_path / "output" / "config.json").read_text()) == config


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(CheckpointError, match=r"must have `model.safetensors` or"):
        to_hf(tmp_path / "source", tmp_path / "output")
    assert without_output(tmp_path / "output")


def test_the_size_of_bools_by_older_transformers_is_no_error(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({"mask": torch.ones(12, dtype=torch.bool)}, source / "a.safetensors")
    index = {"metadata": {"total_size": 1.5}, "weight_map": {"mask": "a.safetensors"}}
    (source / INDEX).write_text(json.dumps(index))
    to_hf(source, tmp_path / "output")
    assert state_dict(tmp_path / "output")["mask"].all()


def test_an_index_of_one_file_is_read(tmp_path, saved):
    (tmp_path / "source").mkdir()
    state = state_dict(saved)
    save_file(state, tmp_path / "source" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model.safetensors")}
    (tmp_path / "source" / INDEX).write_text(json.dumps(index))
    to_hf(tmp_path / "source", tmp_path / "output")
    assert_same(state_dict(tmp_path / "output"), state)
