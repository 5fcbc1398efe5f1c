"""What lies beside the weights of Hugging Face transformers: the config and the tokenizer."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_directories import edit, from_pretrained, logits, pt_to_hf, save, to_hf, without_output
from tp_embed.checkpoint import CheckpointError, UnsafeCheckpointError


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
