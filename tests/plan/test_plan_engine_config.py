"""``tp-embed plan --config``, with a DeepSpeed config."""

from __future__ import annotations

import json

import pytest

from tp_embed import cli
from tp_embed.integrations.deepspeed.config import EmbedConfig
from tp_embed.plan import Setup, cost
from tp_embed.plan.engine_config import KEYS

TABLE = ("--vocab-size", "1000", "--embed-dim", "64")
NGRAM = {"*.ngram*": {"optimizer": "rowwise_adam", "lr": 0.1, "weight_decay": 0.1}}


@pytest.fixture
def plan(capsys, tmp_path):
    def run(config, *arguments, code=0):
        path = tmp_path / "ds_config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        found = cli.main(["plan", "--config", str(path), *TABLE, *arguments, "--json"])
        assert found == code
        return json.loads(capsys.readouterr().out)

    return run


def test_the_section_has_these_keys():
    assert set(KEYS) == set(EmbedConfig.model_fields)


def test_a_config_makes_the_plan(plan):
    config = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "tensor_parallel": {"autotp_size": 8},
        "zero_optimization": {"stage": 2},
        "tp_embed": {"strategy": "vocab", "shard_logits": True, "dedup": True},
    }
    data = plan(config, "--dp", "2")
    setup = Setup(
        1000, 64, tp_size=8, dp_size=2, zero_stage=2, grad_dtype="fp32", optimizer="momentum",
        accumulation_steps=4,
    )  # fmt: skip
    assert Setup(**data["setup"]) == setup
    chosen = data["strategies"][data["chosen"]]
    assert (chosen["strategy"], chosen["shard_logits"], chosen["dedup"]) == ("vocab", True, True)
    # Options go before the config.
    data = plan(config, "--tp", "4", "--zero-stage", "3", "--strategy", "embed")
    assert (data["setup"]["tp_size"], data["setup"]["zero_stage"]) == (4, 3)
    assert data["strategies"][data["chosen"]]["strategy"] == "embed"
    data = plan({}, "--strategy", "none")
    assert (data["setup"]["zero_stage"], data["setup"]["dtype"]) == (0, "fp32")


def test_a_table_has_its_own_optimizer(plan):
    section = {"rules": {"*.ngram*": "world"}, "placement": "cyclic", "tables": NGRAM}
    config = {"zero_optimization": {"stage": 1}, "tp_embed": section}
    setup = Setup(
        1000, 64, dp_size=4, dtype="fp32", head=False, table_optimizer="rowwise_adam",
        table_decay=True, placement="cyclic",
    )  # fmt: skip
    for table in ((), ("--table", "model.ngram.0")):
        data = plan(config, "--dp", "4", "--no-head", *table)
        assert Setup(**data["setup"]) == setup
        chosen = data["strategies"][data["chosen"]]
        assert chosen["name"] == "world, dedup"
        assert chosen["memory"]["moments"] == 250 * (4 * 64 + 4 + 8)
        assert chosen["rows_in_use"] == cost(setup, "world", dedup=True).rows
    data = plan(config, "--dp", "4", "--no-head", "--table", "model.embed_tokens")
    assert data["setup"]["table_optimizer"] is None
    assert data["strategies"][data["chosen"]]["strategy"] == "embed"


def test_a_tied_table_stays_whole_as_in_the_engine(plan):
    config = {"zero_optimization": {"stage": 1}, "tp_embed": {"tie_head": False}}
    for tied, strategy in (("--tied", "none"), ("--no-tied", "embed")):
        data = plan(config, "--tp", "2", tied)
        assert data["strategies"][data["chosen"]]["strategy"] == strategy


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("{", (), "must be JSON"),
        ("[]", (), "must hold a JSON object"),
        ({"tp_embed": {"tabels": {}}}, (), "but has ['tabels']"),
        ({"tp_embed": {"tables": {"a": {"optimizer": "adam"}}}}, (), "but has 'adam'"),
        (
            {"tp_embed": {"tables": {"a": {"optimizer": "lazy_adam", "memory": "/nvme"}}}},
            (),
            "must have no `memory` for 'a'",
        ),
        ({"tp_embed": {"rules": {"a": "embed", "b": "vocab"}}}, (), "--table must be the name"),
        ({"tp_embed": {"rules": {"*.wpe": "none"}}}, (), "has the patterns ['*.wpe']"),
        ({"tp_embed": {"strategy": "rows"}}, (), "The strategy of '' must be one of"),
        ({"tp_embed": {"placement": "random"}}, (), "`placement` must be one of"),
        ({"optimizer": {"type": "Lamb"}}, (), "is 'Lamb': give --optimizer"),
        ({"fp16": {"enabled": True}}, (), "Give --dtype"),
        ({"zero_optimization": {"stage": 4}}, (), "`zero_stage` must be one of"),
        ({"tp_embed": {"strategy": "world"}}, (), "'embed' or 'vocab' for one rank"),
        ({"tp_embed": {"strategy": "world"}}, ("--dp", "2", "--tied"), "`tied` must be false"),
        (
            {"tp_embed": {"strategy": "none", "tables": {"a": {"optimizer": "lazy_adam"}}}},
            (),
            "`strategy` must be 'embed', 'vocab' or 'world'",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(plan, config, arguments, message):
    found = plan(config, *arguments, code=cli.FAILED if isinstance(config, str) else cli.USAGE)
    assert message in found["error"]


def test_a_name_without_a_config_is_refused(capsys):
    assert cli.main(["plan", *TABLE, "--table", "model.embed_tokens"]) == cli.USAGE
    assert "--table must come with --config" in capsys.readouterr().err
