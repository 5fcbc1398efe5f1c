"""The Hydra configs: every choice composes, and what is misspelt or of a wrong type is an error."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import hydra
import pytest
import torch
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tp_embed import StandardEmbedding, init
from tp_embed.integrations.hydra import register_schemas

CONFIGS = Path(__file__).parent.parent / "configs"


def choices(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def _hydra():
    register_schemas()
    with hydra.initialize_config_module("tp_embed.configs", version_base="1.3"):
        yield


def train_config(*overrides):
    return hydra.compose("train", overrides=list(overrides))


@pytest.mark.parametrize("group", ["init", "embedding", "model", "deepspeed"])
def test_every_choice_composes(group):
    for choice in choices(group):
        extra = ["init.source=table.safetensors"] if choice == "from_tensor" else []
        config = train_config(f"{group}={choice}", *extra)
        assert not OmegaConf.missing_keys(config)
        OmegaConf.to_container(config, resolve=True)


def test_there_is_a_config_for_every_init_function_with_its_parameters():
    functions = {
        name: fn
        for name, fn in vars(init).items()
        if callable(fn) and init.is_blockwise(fn) and name != "init_scaled_embedding"
    }
    assert choices("init") == sorted(functions)
    for name, fn in functions.items():
        config = OmegaConf.load(CONFIGS / "init" / f"{name}.yaml")
        assert config.pop("_target_") == f"tp_embed.init.{name}"
        assert config.pop("_partial_") is True
        parameters = dict(list(inspect.signature(fn).parameters.items())[1:])
        assert set(config) == set(parameters)
        for key, parameter in parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert config[key] == parameter.default


def test_init_options_reach_the_table():
    embedding = train_config("init=normal", "init.mean=5.0", "init.std=0.01").embedding
    embed = StandardEmbedding(100, 30, init_fn=instantiate(embedding.init_fn))
    assert embed.weight.mean().item() == pytest.approx(5.0, abs=1e-3)
    assert embed.weight.std().item() == pytest.approx(0.01, rel=0.1)

    embedding = train_config("init=xavier_uniform").embedding
    torch.manual_seed(3)
    embed = StandardEmbedding(100, 30, init_fn=instantiate(embedding.init_fn))
    torch.manual_seed(3)
    assert torch.equal(embed.weight, StandardEmbedding(100, 30, init_fn=init.xavier_uniform).weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init.stdd=0.01", "Key 'stdd' is not in struct"),
        ("data.seqlen=3", "Key 'seqlen' not in 'DataConfig'"),
        ("model.hidden=3", "Key 'hidden' not in 'ModelConfig'"),
        ("stepz=3", "Key 'stepz' not in 'TrainConfig'"),
        ("steps=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("model.tie_word_embeddings=maybe", "Value 'maybe' is not a valid bool"),
        ("embedding.strategy=rows", r"expected one of \[auto, embed, vocab, none\]"),
    ],
)
def test_bad_override_is_named(override, message):
    with pytest.raises(ConfigCompositionException) as caught:
        train_config(override)
    assert caught.match("Error merging override|Could not override")
    causes = [str(caught.value), str(caught.value.__cause__)]
    assert any(re.search(message, cause) for cause in causes), causes


def test_unknown_choice_lists_the_choices():
    with pytest.raises(MissingConfigException) as caught:
        train_config("init=xavier")
    for choice in choices("init"):
        assert choice in str(caught.value)
