"""``tp-embed plan`` through Hydra."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import hydra
import pytest
from hydra.errors import ConfigCompositionException

from tp_embed import cli
from tp_embed.integrations.hydra.plan import options, register_schema
from tp_embed.integrations.hydra.plan import run as run_app
from tp_embed.plan import Setup, cost


@pytest.fixture
def compose():
    register_schema()
    with hydra.initialize_config_module("tp_embed.configs", version_base="1.3"):
        yield lambda *overrides: hydra.compose("plan", overrides=list(overrides))


def test_config_has_the_options_of_the_command(compose):
    names = set(vars(cli._parser().parse_args(["plan"]))) - {"command"}
    assert set(options(compose())) == names | {"shard_head"}


def test_groups_make_the_plan(compose, capsys):
    config = compose(
        "model=llama3_2_1b",
        "embedding=vocab_sharded",
        "head=local_logits",
        "deepspeed=zero3",
        "deepspeed.gradient_accumulation_steps=2",
        "+deepspeed.data_types.grad_accum_dtype=fp32",
        "optimizer=sgd",
        "tp_size=8",
        "dp_size=4",
        "json=true",
    )
    assert run_app(config) == 0
    data = json.loads(capsys.readouterr().out)
    setup = Setup(
        128256,
        2048,
        tied=True,
        tp_size=8,
        dp_size=4,
        zero_stage=3,
        grad_dtype="fp32",
        optimizer="momentum",
        accumulation_steps=2,
    )
    assert (data["setup"]["output"], data["setup"]["device"]) == ("replicated", "cuda")
    chosen = data["strategies"][data["chosen"]]
    assert chosen["memory"]["peak"] == cost(setup, "vocab", shard_logits=True).peak
    assert chosen["sent"] == cost(setup, "vocab", shard_logits=True).sent


def test_a_fused_loss_makes_the_plan(compose, capsys):
    config = compose("model=llama3_2_1b", "head=fused", "tp_size=8", "dp_size=4", "json=true")
    assert run_app(config) == 0
    data = json.loads(capsys.readouterr().out)
    chosen = data["strategies"][data["chosen"]]
    setup = Setup(**data["setup"])
    assert setup.fuse_loss
    assert not any(each["shard_logits"] for each in data["strategies"])
    whole = cost(replace(setup, fuse_loss=False), "vocab")
    assert chosen["memory"]["logits"] < whole.logits / 20
    assert chosen["sent"] < whole.sent


def test_choices_that_leave_tables_whole(compose, capsys):
    for overrides, strategy in [
        (["model=llama3_2_1b", "head=replicated"], "none"),
        (["model=llama3_8b", "head=replicated", "embedding=sharded"], "embed"),
    ]:
        assert run_app(compose("tp_size=2", "json=true", *overrides)) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["strategies"][data["chosen"]]["strategy"] == strategy
        assert data["setup"]["shard_head"] is False


def test_own_keys_make_the_plan(compose, capsys, tmp_path):
    path = tmp_path / "costs.svg"
    config = compose(
        "tp_size=4",
        "embedding.dedup=always",
        "embedding.output=sequence",
        "device=cpu",
        "unique_share=0.2",
        "block_unique_share=0.3",
        "owner_share=0.5",
        f"chart={path}",
        "json=true",
    )
    assert run_app(config) == 0
    data = json.loads(capsys.readouterr().out)
    found = data["setup"]
    assert [found[f"{name}_share"] for name in ("unique", "block_unique", "owner")] == [
        0.2,
        0.3,
        0.5,
    ]
    assert (found["output"], found["device"]) == ("sequence", "cpu")
    assert {each["dedup"] for each in data["strategies"] if each["strategy"] != "none"} == {True}
    assert path.exists()


def test_model_without_a_vocabulary_has_that_of_the_data(compose, capsys):
    assert run_app(compose("model=llama_tiny", "precision=fp32", "json=true")) == 0
    found = json.loads(capsys.readouterr().out)["setup"]
    assert (found["vocab_size"], found["dtype"]) == (32000, "fp32")


def test_bad_override_is_named(compose):
    with pytest.raises(ConfigCompositionException) as caught:
        compose("tpsize=2")
    assert "Key 'tpsize' not in 'PlanConfig'" in f"{caught.value} {caught.value.__cause__}"


def test_app_has_the_exit_codes_of_the_command_and_leaves_no_files(tmp_path):
    def app(*overrides):
        command = [sys.executable, "-m", "tp_embed.integrations.hydra.plan", *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    good = app("model=qwen3_8b", "tp_size=8")
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("151936 x 4096, untied head; TP 8")
    assert app("tp_size=0").returncode == cli.USAGE
    assert app("tpsize=2").returncode == cli.USAGE
    assert list(tmp_path.iterdir()) == []
