"""Hydra configs of tables over all ranks, and of tables with an optimizer of their own."""

from __future__ import annotations

import json
import re
from typing import get_args

import hydra
import pytest
from hydra.errors import ConfigCompositionException

from tp_embed.integrations.deepspeed.config import TableConfig, read_section
from tp_embed.integrations.hydra import register_schemas, schema, shard_options, table_options
from tp_embed.integrations.hydra.plan import register_schema
from tp_embed.integrations.hydra.plan import run as run_plan
from tp_embed.nn.embedding import Placement
from tp_embed.surgery.options import Strategy

NGRAM = "+embedding.tables={ngram:{optimizer:rowwise_adam,lr:0.1,betas:[0.8,0.9]}}"


@pytest.fixture
def compose():
    register_schemas()
    register_schema()
    with hydra.initialize_config_module("tp_embed.configs", version_base="1.3"):
        yield lambda name, *overrides: hydra.compose(name, overrides=list(overrides))


def test_the_schema_has_the_choices_and_keys_of_the_section():
    assert {choice.value for choice in schema.Strategy} == set(get_args(Strategy))
    assert {choice.value for choice in schema.Placement} == set(get_args(Placement))
    keys = TableConfig.model_fields
    assert {c.value for c in schema.TableOptimizer} == set(get_args(keys["optimizer"].annotation))
    assert set(schema.TableConfig.__dataclass_fields__) == set(keys)


def test_choices_are_options_of_shard_embeddings_and_of_the_section(compose):
    config = compose("train", NGRAM, "+embedding.rules={ngram:world}", "embedding.placement=cyclic")
    options = shard_options(config)
    assert (options["rules"], options["placement"]) == ({"ngram": "world"}, "cyclic")
    tables = table_options(config)
    assert tables == {"ngram": {"optimizer": "rowwise_adam", "lr": 0.1, "betas": [0.8, 0.9]}}
    read_section({"tp_embed": {"tables": tables}})
    assert table_options(compose("train")) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embedding.placement=rows", r"expected one of \[block, cyclic\]"),
        ("+embedding.tables={a:{optimizer:adam}}", "expected one of .lazy_adam, rowwise_adagrad"),
        ("+embedding.tables={a:{optimizer:lazy_adam,rate:1}}", "Key 'rate' not in 'TableConfig'"),
        ("+embedding.tables={a:{optimizer:lazy_adam,lr:x}}", "could not be converted to Float"),
    ],
)
def test_bad_override_is_named(compose, override, message):
    with pytest.raises(ConfigCompositionException) as caught:
        compose("train", override)
    causes = [str(caught.value), str(caught.value.__cause__)]
    assert any(re.search(message, cause) for cause in causes), causes


def test_the_planner_takes_them(compose, capsys):
    rules = "+embedding.rules={model.embed_tokens:world,model.wpe:none}"
    tables = NGRAM.replace("ngram", "model.embed_tokens")
    given = [rules, tables, "embedding.placement=cyclic", "dp_size=4", "json=true"]
    assert run_plan(compose("plan", *given, "table=model.embed_tokens")) == 0
    data = json.loads(capsys.readouterr().out)
    setup = data["setup"]
    assert (setup["table_optimizer"], setup["placement"]) == ("rowwise_adam", "cyclic")
    assert data["strategies"][data["chosen"]]["name"] == "world, dedup"
    assert run_plan(compose("plan", *given)) == 2
    assert "--table must be the name" in json.loads(capsys.readouterr().out)["error"]
