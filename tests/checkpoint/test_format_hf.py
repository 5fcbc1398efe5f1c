"""Directories of Hugging Face transformers: what transformers writes is read, it reads what we
write."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from hf_directories import (
    HEAD,
    INDEX,
    TABLE,
    assert_same,
    from_pretrained,
    logits,
    metadata,
    pt_to_hf,
    save,
    state_dict,
    to_hf,
    without_output,
)
from tp_embed.checkpoint import CheckpointError, Request, Rule, UnsafeCheckpointError, convert, read
from tp_embed.checkpoint.contents import ReadOptions


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", [9_000, 30_000, 5_000_000_000])
def test_transformers_loads_what_was_converted(tmp_path, tied, max_shard_size):
    model = save(tmp_path / "source", tied)
    convert(
        tmp_path / "source",
        tmp_path / "output",
        Request("hf", source_format="hf", max_shard_size=max_shard_size),
        verify=True,
    )

    loaded = from_pretrained(tmp_path / "output")

    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_same(state_dict(tmp_path / "output"), state_dict(tmp_path / "source"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "output" / name).read_bytes() == (
            tmp_path / "source" / name
        ).read_bytes()


@pytest.mark.parametrize("max_shard_size", [1, 8_000, 20_000, 50_000, 10**9])
def test_the_files_are_those_that_huggingface_hub_writes(tmp_path, max_shard_size):
    model = save(tmp_path / "source", max_shard_size="1GB")
    values = load_file(tmp_path / "source" / "model.safetensors")
    ordered = {
        key.name: values[key.name] for key in read(tmp_path / "source", ReadOptions(), "hf").tensors
    }
    (tmp_path / "expected").mkdir()
    save_torch_state_dict(ordered, tmp_path / "expected", max_shard_size=max_shard_size)
    plan = split_torch_state_dict_into_shards(ordered, max_shard_size=max_shard_size)

    to_hf(tmp_path / "source", tmp_path / "output", max_shard_size=max_shard_size)

    written = sorted(file.name for file in (tmp_path / "output").glob("model*"))
    assert written == sorted(file.name for file in (tmp_path / "expected").iterdir())
    for file, names in plan.filename_to_tensors.items():
        assert metadata(tmp_path / "output" / file) == {"format": "pt"}
        assert_same(load_file(tmp_path / "output" / file), {name: ordered[name] for name in names})
    if plan.is_sharded:
        index = json.loads((tmp_path / "output" / INDEX).read_text())
        assert index == json.loads((tmp_path / "expected" / INDEX).read_text())
    assert sum(p.numel() for p in model.parameters()) == sum(v.numel() for v in values.values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_goes_to_a_file_of_torch_and_back(tmp_path, tied):
    model = save(tmp_path / "hf", tied)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")

    pt_to_hf(tmp_path / "model.pt", tmp_path / "one", hf_config=tmp_path / "hf")
    convert(tmp_path / "one", tmp_path / "back.pt", Request("pt", source_format="hf"))
    pt_to_hf(tmp_path / "back.pt", tmp_path / "two", hf_config=tmp_path / "hf")

    assert_same(torch.load(tmp_path / "back.pt")["model"], dict(model.state_dict()))
    for path in (tmp_path / "one", tmp_path / "two"):
        assert (HEAD in state_dict(path)) == (not tied)
        assert torch.equal(logits(from_pretrained(path)), logits(model))


def test_tensors_of_mixed_dtypes_are_aligned(tmp_path):
    state = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(5).half(), "c": torch.ones(2)}
    torch.save(state, tmp_path / "model.pt")
    pt_to_hf(tmp_path / "model.pt", tmp_path / "output")
    data = (tmp_path / "output" / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for name, tensor in state.items():
        assert (8 + size + header[name]["data_offsets"][0]) % tensor.element_size() == 0
    assert_same(state_dict(tmp_path / "output"), state)


def test_bfloat16_is_rounded_as_torch_does(tmp_path):
    model = save(tmp_path / "source")
    to_hf(tmp_path / "source", tmp_path / "output", dtype=torch.bfloat16)

    assert_same(state_dict(tmp_path / "output"), dict(model.to(torch.bfloat16).state_dict()))
    loaded = from_pretrained(tmp_path / "output", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    expected = from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(expected))


def test_values_beyond_the_range_of_a_dtype_are_refused(tmp_path):
    model = save(tmp_path / "source")
    with torch.no_grad():
        model.lm_head.weight[7, 3] = 1e6
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(
        CheckpointError, match=r"`lm_head.weight` must be in the range of torch.flo"
    ):
        to_hf(tmp_path / "large", tmp_path / "output", dtype=torch.float16)
    assert without_output(tmp_path / "output")


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_torch_are_read(tmp_path, sharded):
    model = save(tmp_path / "hf", tied=True)
    path = tmp_path / "source"
    path.mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", path)
    state = dict(model.state_dict())
    plan = split_torch_state_dict_into_shards(
        state,
        filename_pattern="pytorch_model{suffix}.bin",
        max_shard_size=20_000 if sharded else 10**9,
    )
    for file, names in plan.filename_to_tensors.items():
        torch.save({name: state[name] for name in names}, path / file)
    if sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    to_hf(path, tmp_path / "output")

    assert read(path, ReadOptions(), "hf").ties == {HEAD: TABLE}
    assert torch.equal(logits(from_pretrained(tmp_path / "output")), logits(model))
    if sharded:
        torch.save([state[TABLE]], path / plan.tensor_to_filename[TABLE])
        with pytest.raises(CheckpointError, match="must hold a state dict, but holds a list"):
            to_hf(path, tmp_path / "other")
        torch.save({TABLE: print}, path / plan.tensor_to_filename[TABLE])
        with pytest.raises(UnsafeCheckpointError):
            to_hf(path, tmp_path / "other")


def test_buffers_empty_tensors_and_every_dtype_are_kept(tmp_path):
    state = {
        "a.count": torch.tensor(3),
        "b.mask": torch.tensor([True, False]),
        "c.empty": torch.empty(0, 4),
        "d.nan": torch.tensor([float("nan"), float("-inf")], dtype=torch.float16),
        "e.complex": torch.randn(3, dtype=torch.complex64),
        "f.bytes": torch.arange(5, dtype=torch.uint8),
        "g.double": torch.randn(2, 3, dtype=torch.float64),
    }
    save_file(state, tmp_path / "one.safetensors")
    convert(
        tmp_path / "one.safetensors",
        tmp_path / "output",
        Request("hf", source_format="hf", max_shard_size=10),
        verify=True,
    )
    written = state_dict(tmp_path / "output")
    assert torch.isnan(written["d.nan"][0])
    assert torch.isinf(written["d.nan"][1])
    del state["d.nan"], written["d.nan"]
    assert_same(written, state)


def test_a_file_size_must_be_positive(tmp_path):
    save(tmp_path / "source")
    with pytest.raises(CheckpointError, match="`--max-shard-size` must be at least 1 byte"):
        to_hf(tmp_path / "source", tmp_path / "output", max_shard_size=0)
    assert without_output(tmp_path / "output")


def test_a_killed_conversion_is_resumed(tmp_path):
    model = save(tmp_path / "source")
    request = Request("hf", source_format="hf", max_shard_size=20_000)
    written = []

    def interrupt(nbytes):
        written.append(nbytes)
        if len(written) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "output", request, progress=interrupt)
    assert not (tmp_path / "output").exists()
    convert(tmp_path / "source", tmp_path / "output", request, resume=True, verify=True)
    assert torch.equal(logits(from_pretrained(tmp_path / "output")), logits(model))


def test_rules_say_which_table_has_padding(tmp_path):
    save_file({"words": torch.randn(8, 2), "x": torch.randn(8, 2)}, tmp_path / "one.safetensors")
    to_hf(
        tmp_path / "one.safetensors",
        tmp_path / "output",
        vocab_size=6,
        read=ReadOptions(rules=(Rule.parse("words=vocab"),)),
    )
    shapes = {name: len(value) for name, value in state_dict(tmp_path / "output").items()}
    assert shapes == {"words": 6, "x": 8}
