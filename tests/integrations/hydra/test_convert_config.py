"""``tp-embed convert`` through Hydra has the same options, results and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files

import hydra
import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from tp_embed import cli
from tp_embed.integrations.hydra.convert import ConvertConfig, register_schema, run

APP = [sys.executable, "-m", "tp_embed.integrations.hydra.convert"]


@pytest.fixture(autouse=True)
def _hydra():
    register_schema()
    with hydra.initialize_config_module("tp_embed.configs", version_base="1.3"):
        yield


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in" / "model.pt"
    path.parent.mkdir()
    torch.save({"embed_tokens.weight": torch.randn(12, 4), "qkv.weight": torch.randn(6, 4)}, path)
    return path


def compose(*overrides):
    return hydra.compose("convert", overrides=list(overrides))


def test_config_has_the_options_of_the_command_with_their_defaults():
    options = vars(cli._parser().parse_args(["convert", "a", "b", "--to", "pt"]))
    del options["command"]
    assert {field.name for field in fields(ConvertConfig)} == set(options)
    assert OmegaConf.to_container(compose("source=a", "output=b", "to=pt")) == options
    written = OmegaConf.load(files("tp_embed.configs") / "convert.yaml")
    assert {*written, "source", "output", "to"} - {"defaults", "hydra"} == set(options)


def test_converts_as_the_command_does(source, tmp_path, capsys):
    rules = '["qkv.weight=0/3"]'
    overrides = ("to=tp-embed", "tp=2", f"rules={rules}", "nan=refuse")
    config = compose(f"source={source}", f"output={tmp_path}/a", "json=true", *overrides)
    assert run(config) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"][1]["cut"] == {
        "dim": 0,
        "ranges": [[[0, 1], [2, 3], [4, 5]], [[1, 2], [3, 4], [5, 6]]],
    }
    options = ("--to", "tp-embed", "--tp", "2", "--rules", "qkv.weight=0/3")
    assert cli.main(["convert", str(source), f"{tmp_path}/b", *options, "--nan", "refuse"]) == 0
    written = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b")]
    assert written[0]
    for first, second in zip(*written, strict=True):
        assert first.relative_to(tmp_path / "a") == second.relative_to(tmp_path / "b")
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("too=hf", "Key 'too' not in 'ConvertConfig'"),
        ("tp=two", "Value 'two' of type 'str' could not be converted to Integer"),
        ("dry_run=maybe", "Value 'maybe' is not a valid bool"),
        ("zero_stage=null", "field 'zero_stage' is not Optional"),
    ],
)
def test_bad_override_is_named(override, message):
    with pytest.raises(ConfigCompositionException) as caught:
        compose(override)
    assert message in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("to=onnx", "['tp-embed', 'universal', "),
        ("source_format=onnx", "['tp-embed', 'universal', "),
        ("dim=rows", "['vocab', 'embed']"),
        ("nan=drop", "['keep', 'refuse']"),
        ("zero_stage=4", "[0, 1, 2, 3]"),
        ("tp=0", "must be in [1, 65536]"),
        ("max_shard_size=5XB", "5GB"),
    ],
)
def test_wrong_value_lists_the_choices(source, tmp_path, capsys, override, message):
    config = compose(f"source={source}", f"output={tmp_path}/a", "to=hf", override)
    assert run(config) == cli.USAGE
    assert message in capsys.readouterr().err


def test_missing_keys_are_listed(capsys):
    assert run(compose("to=hf")) == cli.USAGE
    assert "['output', 'source'] must be given" in capsys.readouterr().err


def test_app_has_the_exit_codes_of_the_command_and_leaves_no_other_files(source, tmp_path):
    def app(*overrides):
        return subprocess.run([*APP, *overrides], cwd=tmp_path, capture_output=True, text=True)

    convert = ("source=in/model.pt", "output=in", "to=hf")
    failed = app(*convert)
    assert failed.returncode == cli.FAILED
    assert failed.stderr.startswith("tp-embed: error: `in` must be new")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    misspelt = app(*convert, "ressume=true")
    assert misspelt.returncode == cli.USAGE
    assert "ressume" in misspelt.stderr


FAULTY = """
from tp_embed.integrations.hydra.command_app import run_command
from tp_embed.integrations.hydra.convert import register_schema

def fail(config):
    raise RuntimeError("a fault of the program")

register_schema()
raise SystemExit(run_command("convert", fail))
"""


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("dp=2", cli.FAILED, "a fault of the program"),
        ("dq=2", cli.USAGE, "Could not override 'dq'"),
    ],
)
def test_fault_is_not_taken_for_wrong_usage(tmp_path, override, code, message):
    command = [sys.executable, "-c", FAULTY, override]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
