"""Directories of Hugging Face transformers: what transformers writes is read, it reads what we
write, and whatever is wrong with one is an error that leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import llama
from tp_embed.checkpoint import (
    CheckpointError,
    Key,
    Request,
    Rule,
    UnsafeCheckpointError,
    convert,
    read,
)
from tp_embed.checkpoint.contents import ReadOptions

INDEX = "model.safetensors.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def to_hf(source, output, **options):
    return convert(source, output, Request("hf", source_format="hf", **options))


def pt_to_hf(source, output, **options):
    return convert(source, output, Request("hf", source_format="pt", **options))


def save(path, tied=False, *, max_shard_size="20KB", dtype=torch.float32, **config):
    """Saves a Llama with transformers."""
    model = llama.build(tied).to(dtype).eval()
    model.config.update(config)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(llama.VOCAB)[None]).logits


def from_pretrained(path, **options):
    model, info = LlamaForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def state_dict(path):
    """Loads all tensors of a directory with safetensors."""
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def without_output(path):
    """Returns whether nothing was left at or next to `path`."""
    return not path.exists() and not list(path.parent.glob(f".{path.name}*"))


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


def test_a_tie_is_recorded_as_safetensors_does(tmp_path):
    model = save(tmp_path / "hf", tied=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_model(model, tmp_path / "expected.safetensors", {"format": "pt"})

    pt_to_hf(tmp_path / "model.pt", tmp_path / "output", hf_config=tmp_path / "hf")

    found = metadata(tmp_path / "output" / "model.safetensors")
    assert sorted((found.keys() | set(found.values())) - {"format", "pt"}) == sorted([TABLE, HEAD])
    assert read(tmp_path / "output", ReadOptions(), "hf").ties == {HEAD: TABLE}
    assert set(metadata(tmp_path / "expected.safetensors").items()) & {(HEAD, TABLE), (TABLE, HEAD)}
    single = read(tmp_path / "expected.safetensors", ReadOptions(), "hf")
    assert {*single.ties, *single.ties.values()} == {TABLE, HEAD}
    other = llama.build(True, seed=1)
    assert load_model(other, tmp_path / "output" / "model.safetensors") == (set(), [])
    assert torch.equal(logits(other.eval()), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"tie_word_embeddings": False},
        {"text_config": {"tie_word_embeddings": True}},
        {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
    ],
)
@pytest.mark.parametrize("max_shard_size", [1, 10**9])
def test_each_name_is_written_unless_the_config_surely_ties_them(tmp_path, config, max_shard_size):
    model = llama.build(True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    hf_config = None
    if config is not None:
        hf_config = tmp_path / "config"
        hf_config.mkdir()
        (hf_config / "config.json").write_text(json.dumps(config))

    convert(
        tmp_path / "model.pt",
        tmp_path / "output",
        Request("hf", source_format="pt", hf_config=hf_config, max_shard_size=max_shard_size),
        verify=True,
    )

    assert_same(state_dict(tmp_path / "output"), dict(model.state_dict()))
    again = read(tmp_path / "output", ReadOptions(), "hf")
    assert again.ties == {HEAD: TABLE}
    assert Key(HEAD) not in again.tensors


def test_a_tie_that_transformers_does_not_know_is_written_under_each_name(tmp_path):
    save(tmp_path / "hf", tied=True)
    table, scale = torch.randn(llama.VOCAB, 4), torch.randn(3)
    state = {TABLE: table, HEAD: table, "a.proj.weight": table, "b.scale": scale, "c.scale": scale}
    torch.save(state, tmp_path / "model.pt")

    pt_to_hf(tmp_path / "model.pt", tmp_path / "output", hf_config=tmp_path / "hf")

    del state[HEAD]
    assert_same(state_dict(tmp_path / "output"), state)
    convert(tmp_path / "output", tmp_path / "back.pt", Request("pt", source_format="hf"))
    back = torch.load(tmp_path / "back.pt")["model"]
    assert back[HEAD].data_ptr() == back["a.proj.weight"].data_ptr() == back[TABLE].data_ptr()
    assert back["b.scale"].data_ptr() == back["c.scale"].data_ptr()


def test_names_that_should_be_one_but_differ_are_refused(tmp_path):
    (tmp_path / "source").mkdir()
    save_file(
        {"a": torch.ones(2), "b": torch.zeros(2)},
        tmp_path / "source" / "model.safetensors",
        {"b": "a"},
    )
    with pytest.raises(CheckpointError, match="`a` must be the same"):
        to_hf(tmp_path / "source", tmp_path / "output")
    assert without_output(tmp_path / "output")


def test_ties_that_make_no_sense_are_left_out(tmp_path):
    state = {"a": torch.ones(2), "b": torch.zeros(2), "pt": torch.ones(1), "d": torch.ones(3)}
    claims = {"a": "b", "b": "a", "format": "pt", "note": "text", "d": "d", "e": "gone"}
    save_file(state, tmp_path / "one.safetensors", claims)
    assert read(tmp_path / "one.safetensors", ReadOptions(), "hf").ties == {}
    to_hf(tmp_path / "one.safetensors", tmp_path / "output")
    assert_same(state_dict(tmp_path / "output"), state)

    save_file(state, tmp_path / "two.safetensors", {"d": "a"})
    with pytest.raises(CheckpointError, match="`a` must be the same"):
        read(tmp_path / "two.safetensors", ReadOptions(), "hf")


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


def test_a_user_is_told_that_names_are_not_in_the_checkpoint(tmp_path):
    save(tmp_path / "tied", tied=True)
    save(tmp_path / "untied")
    assert "must tie them itself" in str(read(tmp_path / "tied", ReadOptions(), "hf").notes)
    assert read(tmp_path / "untied", ReadOptions(), "hf").notes == ()


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


def test_the_config_says_the_dtype_that_was_written(tmp_path):
    save(tmp_path / "source")
    edit(
        tmp_path / "source" / "config.json",
        lambda config: config.update(
            torch_dtype="float32",
            vision_config={"torch_dtype": "float32"},
            quantization_config={"dtype": "float32"},
        ),
    )
    to_hf(tmp_path / "source", tmp_path / "output", dtype=torch.bfloat16)

    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["vision_config"] == {"torch_dtype": "bfloat16"}
    assert config["quantization_config"] == {"dtype": "float32"}


def test_a_quantised_model_keeps_the_dtype_of_its_config(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    state = {"a": torch.ones(99).to(torch.float8_e4m3fn), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "source" / "model.safetensors")
    to_hf(tmp_path / "source", tmp_path / "output")
    assert (tmp_path / "output" / "config.json").read_text() == '{"torch_dtype": "bfloat16"}'


def test_the_config_says_how_many_rows_are_left_without_padding(tmp_path):
    model = save(tmp_path / "source")
    to_hf(tmp_path / "source", tmp_path / "output", vocab_size=90)
    loaded = from_pretrained(tmp_path / "output")
    assert loaded.config.vocab_size == 90
    with torch.no_grad():
        ids = torch.arange(90)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits[..., :90])


def test_a_config_of_another_vocabulary_is_refused(tmp_path):
    model = save(tmp_path / "hf")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    edit(tmp_path / "hf" / "config.json", lambda config: config.update(vocab_size=90))
    with pytest.raises(CheckpointError, match=r"which is \[101\], but is 90.*--vocab-size 90"):
        pt_to_hf(tmp_path / "model.pt", tmp_path / "output", hf_config=tmp_path / "hf")
    assert without_output(tmp_path / "output")

    pt_to_hf(tmp_path / "model.pt", tmp_path / "output", hf_config=tmp_path / "hf", vocab_size=90)
    assert from_pretrained(tmp_path / "output").lm_head.weight.shape[0] == 90

    edit(
        tmp_path / "hf" / "config.json",
        lambda config: config.update(vocab_size=101, text_config={"vocab_size": 100}),
    )
    with pytest.raises(CheckpointError, match="but is 100"):
        pt_to_hf(tmp_path / "model.pt", tmp_path / "other", hf_config=tmp_path / "hf")


def test_the_config_directory_must_have_a_config(tmp_path):
    save(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"`--hf-config` must be a directory with `config.js"):
        to_hf(tmp_path / "source", tmp_path / "output", hf_config=tmp_path / "empty")
    assert without_output(tmp_path / "output")


def test_the_tokenizer_is_copied_and_code_and_weights_are_not(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    save(source)
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(source)
    kept = ["spiece.model", "merges.txt", "vocab.json", "chat_template.jinja", "added_tokens.json"]
    left = ["modeling_llama.py", "tokenizer.py", "pytorch_model.bin", "tokenizer.pkl", "notes.txt"]
    for name in kept + left:
        (source / name).write_text("{}")

    to_hf(source, output)

    names = {file.name for file in output.iterdir()}
    assert {*kept, "tokenizer.json", "tokenizer_config.json", "config.json"} <= names
    assert not names & set(left)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    for name in ("added_tokens.json", "merges.txt", "vocab.json", "spiece.model"):
        (output / name).unlink()  # Of another kind of tokenizer.
    assert AutoTokenizer.from_pretrained(output).convert_tokens_to_ids(["b", "a"]) == [1, 0]


def test_the_settings_of_another_directory_win(tmp_path):
    save(tmp_path / "source")
    save(tmp_path / "other", rope_theta=5.0)
    (tmp_path / "source" / "vocab.txt").write_text("old")
    to_hf(tmp_path / "source", tmp_path / "output", hf_config=tmp_path / "other")
    config = (tmp_path / "output" / "config.json").read_text()
    assert config == (tmp_path / "other" / "config.json").read_text()
    assert not (tmp_path / "output" / "vocab.txt").exists()


def test_links_out_of_the_directory_are_not_copied(tmp_path):
    save(tmp_path / "source")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "source" / "tokenizer.json").symlink_to("../secret.json")
    with pytest.raises(UnsafeCheckpointError, match=r"`.*tokenizer.json` must be a file in"):
        to_hf(tmp_path / "source", tmp_path / "output")
    assert without_output(tmp_path / "output")


def test_the_cache_of_the_hub_is_read_with_its_links(tmp_path):
    model = save(tmp_path / "source", tied=True)
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "cache" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "source").iterdir():
        shutil.copy(file, tmp_path / "cache" / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    to_hf(snapshot, tmp_path / "output")
    assert torch.equal(logits(from_pretrained(tmp_path / "output")), logits(model))
    assert not any(file.is_symlink() for file in (tmp_path / "output").iterdir())


@pytest.mark.parametrize("kind", ["directory", "pipe", "nothing", "loop"])
def test_settings_must_be_regular_files(tmp_path, kind):
    save(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.json"
    match kind:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "nothing":
            path.symlink_to("missing.json")
        case "loop":
            path.symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match=r"`.*tokenizer.json` must be a regular file"):
        to_hf(tmp_path / "source", tmp_path / "output")
    assert without_output(tmp_path / "output")


def test_settings_of_absurd_size_are_refused(tmp_path):
    save(tmp_path / "source")
    with (tmp_path / "source" / "tokenizer.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(CheckpointError, match="must have at most 268435456 bytes in total"):
        to_hf(tmp_path / "source", tmp_path / "output")
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
    "header of 2^63 bytes": (edit_bytes(lambda b: b"\xff" * 8 + b[8:]), "format of safet", False),
    "header of no bytes": (edit_bytes(lambda b: bytes(8) + b[8:]), "format of safetensors", False),
    "header longer than the file": (
        edit_bytes(lambda b: struct.pack("<Q", len(b)) + b[8:]),
        "format of safetensors",
        False,
    ),
    "empty file": (edit_bytes(lambda b: b""), "format of safetensors", False),
    "truncated file": (edit_bytes(lambda b: b[:-1]), "must have|is damaged", False),
    "truncated header": (edit_bytes(lambda b: b[:20]), "format of safetensors", False),
    "bytes at the end": (edit_bytes(lambda b: b + b"\0"), "The file is damaged", False),
    "header is no JSON": (edit_bytes(lambda b: b[:8] + b"x" + b[9:]), "must be JSON", False),
    "file of torch": (edit_bytes(lambda b: b"PK\3\4" + b[4:]), "format of safetensors", False),
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
