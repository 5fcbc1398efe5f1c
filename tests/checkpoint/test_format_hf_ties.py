"""Names that share a tensor, in directories of Hugging Face transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model

import llama
from hf_directories import (
    HEAD,
    TABLE,
    assert_same,
    logits,
    metadata,
    pt_to_hf,
    save,
    state_dict,
    to_hf,
    without_output,
)
from tp_embed.checkpoint import CheckpointError, Key, Request, convert, read
from tp_embed.checkpoint.contents import ReadOptions


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


def test_a_user_is_told_that_names_are_not_in_the_checkpoint(tmp_path):
    save(tmp_path / "tied", tied=True)
    save(tmp_path / "untied")
    assert "must tie them itself" in str(read(tmp_path / "tied", ReadOptions(), "hf").notes)
    assert read(tmp_path / "untied", ReadOptions(), "hf").notes == ()
