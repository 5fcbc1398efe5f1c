"""Hydra configs: every choice composes, and misspelt keys and wrong types are errors."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from functools import partial
from typing import get_args, get_type_hints

import hydra
import pytest
import torch
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from launch import ROOT
from tp_embed import StandardEmbedding
from tp_embed.integrations.hydra import reference, register_schemas, shard_options
from tp_embed.integrations.hydra.app import explain
from tp_embed.integrations.hydra.inits import INITS, Fan, Init
from tp_embed.nn import init

CONFIGS = ROOT / "configs"
GROUPS = sorted(reference._GROUPS)


def choices(group):
    return list(reference.choices(group))


@pytest.fixture(autouse=True)
def _hydra():
    register_schemas()
    with hydra.initialize_config_module("tp_embed.configs", version_base="1.3"):
        yield


def train_config(*overrides):
    return hydra.compose("train", overrides=list(overrides))


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_composes(group):
    for choice in choices(group):
        extra = ["init.source=table.safetensors"] if choice == "from_tensor" else []
        config = train_config(f"{group}={choice}", *extra)
        assert not OmegaConf.missing_keys(config)
        OmegaConf.to_container(config, resolve=True)


def test_every_group_is_in_the_reference_and_has_a_default():
    directories = [path.parent.name for path in CONFIGS.rglob("*.yaml")]
    assert {*directories} - {"configs", "tp_embed"} == {*GROUPS}
    assert {*reference._defaults()} == {*GROUPS}


def test_reference_is_current():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference.reference(), (
        "python -m tp_embed.integrations.hydra.reference docs/config.md"
    )


def init_functions():
    return {
        name: fn
        for name, fn in vars(init).items()
        if callable(fn) and init.is_blockwise(fn) and name != "init_scaled_embedding"
    }


def test_there_is_a_config_for_every_init_function_with_its_parameters():
    functions = init_functions()
    assert choices("init") == sorted(functions) == sorted(INITS)
    for name, fn in functions.items():
        chosen = train_config(f"init={name}").init
        assert OmegaConf.get_type(chosen) is INITS[name]
        config = {key: None if OmegaConf.is_missing(chosen, key) else chosen[key] for key in chosen}
        assert config.pop("_target_") == f"tp_embed.nn.init.{name}"
        assert config.pop("_partial_") is True
        parameters = dict(list(inspect.signature(fn).parameters.items())[1:])
        assert set(config) == set(parameters)
        for key, parameter in parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert config[key] == parameter.default


def test_schemas_of_init_functions_have_the_types_of_their_parameters():
    assert [mode.value for mode in Fan] == list(get_args(init.Fan))
    for name, fn in init_functions().items():
        types = get_type_hints(INITS[name])
        for key, parameter in list(inspect.signature(fn).parameters.items())[1:]:
            if parameter.annotation in ("float", "str | None"):
                assert str(types[key]).removeprefix("<class '").removesuffix("'>") == (
                    parameter.annotation
                )
        assert issubclass(INITS[name], Init)


def test_every_init_function_fills_a_table(tmp_path):
    from safetensors.torch import save_file

    save_file({"table": torch.ones(20, 8)}, tmp_path / "table.safetensors")
    for name in choices("init"):
        extra = [f"init.source={tmp_path}/table.safetensors"] if name == "from_tensor" else []
        init_fn = shard_options(train_config(f"init={name}", *extra))["init_fn"]
        assert init.is_blockwise(init_fn)
        StandardEmbedding(20, 8, init_fn=init_fn)


def test_nonlinearities_are_those_of_torch():
    config = train_config("init=kaiming_normal", "init.nonlinearity=relu", "init.mode=fan_out")
    torch.manual_seed(3)
    embed = StandardEmbedding(100, 30, init_fn=shard_options(config)["init_fn"])
    torch.manual_seed(3)
    init_fn = partial(init.kaiming_normal, nonlinearity="relu", mode="fan_out")
    assert torch.equal(embed.weight, StandardEmbedding(100, 30, init_fn=init_fn).weight)


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
        ("init.std=0.01", "Key 'std' not in 'Init'"),
        ("init=normal init.stdd=0.01", "Key 'stdd' not in 'Normal'"),
        ("init=normal init.std=abc", "Value 'abc' of type 'str' could not be converted to Float"),
        ("init=kaiming_normal init.mode=fan", r"expected one of \[fan_in, fan_out\]"),
        ("init=kaiming_normal init.nonlinearity=gelu", r"expected one of \[linear, sigmoid, tanh"),
        ("embedding.output=whole", r"expected one of \[replicated, sequence, shard\]"),
        ("embedding.dedup=on", r"expected one of \[auto, always, never\]"),
        ("+embedding.rules={lm_head:rows}", r"expected one of \[auto, embed, vocab, world, none\]"),
        ("head.tied=true", "Key 'tied' not in 'HeadConfig'"),
        ("deepspeed.optimizer.params.weight_decay=x", "could not be converted to Float"),
        ("deepspeed.optimizer.params.decay=0", "Key 'decay' not in 'AdamParams'"),
        ("data.seqlen=3", "Key 'seqlen' not in 'DataConfig'"),
        ("model.hidden=3", "Key 'hidden' not in 'ModelConfig'"),
        ("stepz=3", "Key 'stepz' not in 'TrainConfig'"),
        ("steps=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("model.tie_word_embeddings=maybe", "Value 'maybe' is not a valid bool"),
        ("embedding.strategy=rows", r"expected one of \[auto, embed, vocab, world, none\]"),
    ],
)
def test_bad_override_is_named(override, message):
    with pytest.raises(ConfigCompositionException) as caught:
        train_config(*override.split(" "))
    assert caught.match("Error merging override|Could not override")
    causes = [str(caught.value), str(caught.value.__cause__)]
    assert any(re.search(message, cause) for cause in causes), causes


@pytest.mark.parametrize("group", GROUPS)
def test_unknown_choice_lists_the_choices(group):
    with pytest.raises(MissingConfigException) as caught:
        train_config(f"{group}=xavier")
    for choice in choices(group):
        assert choice in str(caught.value)


def test_the_embedding_and_the_head_are_arguments_of_shard_embeddings():
    defaults = {"rules": {}, "placement": "block", "output": "replicated", "dedup": "auto"}
    defaults |= {"sparse": None, "reuse_grad": None, "check_ids": None, "train_rows": {}}
    whole = {"tie_head": False, "shard_head": False}
    config = train_config("embedding=vocab_sharded", "head=replicated", "init=zeros")
    options = shard_options(config)
    assert init.is_blockwise(options.pop("init_fn"))
    assert options == {"strategy": "vocab", **defaults, **whole}
    given = [
        f"embedding.{option}"
        for option in ("output=sequence", "dedup=never", "reuse_grad=true", "check_ids=0")
    ]
    options = shard_options(train_config(*given))
    found = [options[name] for name in ("output", "dedup", "reuse_grad", "check_ids")]
    assert found == ["sequence", False, True, 0]
    rules = "+embedding.rules={model.wpe:none,lm_head:vocab}"
    assert shard_options(train_config(rules))["rules"] == {"model.wpe": "none", "lm_head": "vocab"}
    rows = "+embedding.train_rows={model.wte:'9:',lm_head:[1,4]}"
    options = shard_options(train_config(rows))
    assert options["train_rows"] == {"model.wte": slice(9, None), "lm_head": [1, 4]}
    for wrong in ("9", "'9'", "'a:'", "'1:2:3:4'"):
        with pytest.raises(ValueError, match="rows must be a list, or a slice such as '32000:'"):
            shard_options(train_config(f"+embedding.train_rows={{model.wte:{wrong}}}"))


def test_init_function_of_the_user_by_its_target():
    config = train_config("init._target_=torch.nn.Identity")
    assert instantiate(config.init).func is torch.nn.Identity


# From the model cards of Meta, Qwen and Google, or the sums over their checkpoints.
PARAMETERS = {
    "llama3_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "qwen3_8b": 8_190_735_360,
    "gemma3_4b": 3_880_263_168,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_real_sizes_have_the_parameters_of_the_real_models(name, monkeypatch):
    train_lm = importlib.import_module("train_lm")
    model = train_config(f"model={name}").model
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(train_lm.make_model_config(model, 32_000))
    assert sum(parameter.numel() for parameter in built.parameters()) == PARAMETERS[name]
    assert built.get_input_embeddings().weight.shape == (model.vocab_size, model.hidden_size)
    tied = built.get_output_embeddings().weight is built.get_input_embeddings().weight
    assert tied == model.tie_word_embeddings
    with pytest.raises(ValueError, match=r"`model.vocab_size` must be 300000 or more"):
        train_lm.make_model_config(model, 300_000)


def test_real_sizes_are_those_that_no_test_trains():
    trained = {"llama_tiny", "llama_small", "qwen3_tiny"}
    assert {*choices("model")} - trained == {*PARAMETERS}


def test_options_of_deepspeed_combine():
    config = train_config(
        "deepspeed=zero3", "precision=bf16", "offload=parameters", "checkpoint=universal",
        "optimizer=adam", "deepspeed.optimizer.params.weight_decay=0.1", "lr=0.5",
    ).deepspeed  # fmt: skip
    assert config.zero_optimization.stage == 3
    assert config.zero_optimization.offload_param.device == "cpu"
    assert config.zero_optimization.offload_optimizer.device == "cpu"
    assert config.bf16.enabled
    assert config.checkpoint.load_universal
    assert config.optimizer.type == "Adam"
    assert config.optimizer.params.weight_decay == 0.1
    assert config.optimizer.params.lr == 0.5


def test_command_line_wins_over_experiment_and_debug():
    config = train_config("experiment=tied_vocab", "debug=tiny", "steps=7", "model=llama_small")
    assert (config.steps, config.eval_batches, config.model.hidden_size) == (7, 1, 256)
    assert (config.name, config.init.std, config.head.shard_logits) == ("tied_vocab", 0.02, True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("init=", lambda: {f"init={choice}" for choice in choices("init")}),
        ("init=xav", lambda: {"init=xavier_normal", "init=xavier_uniform"}),
        ("head=", lambda: {f"head={choice}" for choice in choices("head")}),
        ("model=qwen", lambda: {"model=qwen3_8b", "model=qwen3_tiny"}),
        ("init=normal init.s", lambda: {"init.std="}),
    ],
)
def test_tab_completion(line, expected):
    loader = GlobalHydra.instance().config_loader()
    found = BashCompletion(loader)._query(config_name="train", line=line)
    assert {word for word in found if not word.endswith("/")} == expected()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init=normal init.stdd=0.01", "has the keys mean: float, std: float. Did you mean `std`?"),
        ("init.std=0.01", "`init` has no keys that can be set."),
        ("init=normal init.std=abc", "`init` has the keys mean: float, std: float."),
        ("model.hiden_size=3", "hidden_size: int, intermediate_size: int, num_hidden_layers: int"),
        ("model.hiden_size=3", "extra: Dict[str, Any]. Did you mean `hidden_size`?"),
        ("stepz=3", "The config has the keys name: str, seed: int"),
        ("steps=many", "steps: int, lr: float"),
        ("embedding.strategy=rows", "strategy: auto | embed | vocab | world | none, rules: Dict["),
        ("deepspeed.zero_optimization.stag=1", "has the keys stage. Did you mean `stage`?"),
        ("hydra/launcher=submitit_slurm hydra.launcher.node=3", "Did you mean `nodes`?"),
    ],
)  # fmt: skip
def test_errors_list_the_keys_that_there_are(override, message):
    with pytest.raises(ConfigCompositionException) as caught:
        train_config(*override.split(" "))
    assert message in explain(caught.value)


def test_errors_of_values_and_choices_list_nothing_else():
    """Hydra lists the choices itself."""
    for override in ("+embedding.rules={lm_head:rows}", "init=xavier", "~foo"):
        with pytest.raises((ConfigCompositionException, MissingConfigException)) as caught:
            train_config(override)
        assert explain(caught.value) is None


APP = """
from tp_embed.integrations.hydra import main, register_schemas

register_schemas()


@main(config_path="pkg://tp_embed.configs", config_name="train")
def app(config):
    print("RUN", config.embedding.init_fn._target_, config.embedding.strategy.name, config.name)


app()
"""


def sweep(directory, *overrides):
    (directory / "app.py").write_text(APP)
    command = [sys.executable, "app.py", *overrides]
    output = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    runs = defaultdict(list)
    for line in output.stdout.splitlines():
        if line.startswith("RUN "):
            _, target, strategy, name = line.split()
            runs[name].append((target.removeprefix("tp_embed.nn.init."), strategy))
    return runs


def test_list_of_keys_follows_the_error_of_hydra(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        sweep(tmp_path, "init=normal", "init.stdd=1")
    error = caught.value.stderr
    assert error.index("Could not override 'init.stdd'") < error.index("Did you mean `std`?")
    assert "Traceback" not in error


def test_plugin_that_is_missing_is_named_with_its_package(tmp_path):
    """Hides the plugin from Python by a module with one of its names."""
    (tmp_path / "hydra_plugins" / "hydra_submitit_launcher").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "hydra_submitit_launcher" / "__init__.py").touch()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        sweep(tmp_path, "launcher=submitit_slurm")
    assert "pip install 'tp-embed[slurm]'" in caught.value.stderr


def test_multirun_over_all_init_functions(tmp_path):
    runs = sweep(tmp_path, "--multirun", "init=glob(*)", "name=all", "embedding=vocab_sharded")
    assert runs == {"all": [(name, "vocab") for name in choices("init")]}
    directories = {path.name for path in (tmp_path / "runs" / "all").iterdir() if path.is_dir()}
    assert directories == {f"embedding=vocab_sharded,init={name}" for name in choices("init")}


def test_experiment_is_a_sweep_by_itself(tmp_path):
    runs = sweep(tmp_path, "experiment=sharded_vs_replicated", "debug=tiny")
    strategies = ["none", "embed", "vocab"]
    assert runs == {"sharded_vs_replicated": [("normal", strategy) for strategy in strategies]}
    directories = {p.name for p in (tmp_path / "runs/sharded_vs_replicated").iterdir()}
    assert "embedding=vocab_sharded" in directories


def test_own_init_function_in_a_directory_of_the_user(tmp_path):
    (tmp_path / "mine" / "init").mkdir(parents=True)
    (tmp_path / "mine" / "init" / "mine.yaml").write_text(
        "_target_: my.fn\n_partial_: true\nk: 3\n"
    )
    runs = sweep(tmp_path, "--config-dir", "mine", "init=mine", "init.k=4")
    assert runs == {"train_lm": [("my.fn", "embed")]}


def test_nothing_heavy_is_imported_for_the_configs():
    script = (
        "import sys, tp_embed.configs.groups, tp_embed.integrations.hydra\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")
