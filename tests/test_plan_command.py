"""``tp-embed plan``, from the command line and through Hydra."""

from __future__ import annotations

import json
import subprocess
import sys

import hydra
import pytest
from hydra.errors import ConfigCompositionException
from transformers import GPT2Config, LlamaConfig

from tp_embed import cli
from tp_embed.integrations.hydra.plan import options, register_schema, run
from tp_embed.plan import Network, Setup, cost, costs

TABLE = ("--vocab-size", "1000", "--embed-dim", "64")


def plan(capsys, *arguments):
    code = cli.main(["plan", *arguments, "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out), printed.err


def test_options_make_the_plan(capsys):
    code, data, _ = plan(
        capsys,
        *TABLE,
        *("--tied", "--tp", "3", "--dp", "2", "--zero-stage", "2", "--dtype", "bf16"),
        *("--grad-dtype", "fp32", "--optimizer", "momentum", "--tokens", "100"),
        *("--accumulation-steps", "4", "--bandwidth", "10", "--latency", "5"),
        *("--gpus-per-node", "2", "--inter-bandwidth", "1", "--inter-latency", "50"),
    )
    assert code == 0
    setup = Setup(
        1000,
        64,
        tied=True,
        tp_size=3,
        dp_size=2,
        zero_stage=2,
        grad_dtype="fp32",
        optimizer="momentum",
        tokens=100,
        accumulation_steps=4,
    )
    network = Network(10e9, 5e-6, 2, 1e9, 50e-6)
    for found, planned in zip(data["strategies"], costs(setup), strict=True):
        assert found["strategy"] == planned.strategy
        assert found["memory"]["peak"] == planned.peak
        assert found["memory"]["master"] == planned.master
        assert found["sent"] == planned.sent
        assert found["seconds"] == pytest.approx(planned.seconds(setup, network))
        assert found["seconds"] == pytest.approx(sum(t["seconds"] for t in found["transfers"]))
    assert data["strategies"][data["chosen"]]["strategy"] == "vocab"


def test_table_has_a_column_for_each_strategy(capsys):
    assert cli.main(["plan", *TABLE, "--tp", "2", "--tokens", "10"]) == 0
    heading, names, marks, *lines, best = capsys.readouterr().out.splitlines()
    assert heading.startswith("1000 x 64, untied head; TP 2, DP 1, ZeRO 1; bf16, adamw; 10 tokens")
    assert names.split("  ")[-1] == "vocab, local logits"
    assert marks.split()[0] == "memory,"
    assert marks.split()[2:] == ["auto", "best"]
    setup = Setup(1000, 64, tp_size=2, tokens=10)
    (peaks,) = (line.split()[4:] for line in lines if line.startswith("  peak of a step"))
    assert [float(peak) for peak in peaks] == [
        pytest.approx(found.peak / 2**20, abs=1e-3) for found in costs(setup)
    ]
    assert (
        best == "best: embed, local logits: of those that need the least memory it sends the least"
    )


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "text_config"])
def test_config_of_a_model_is_read(tmp_path, capsys, nested):
    config = LlamaConfig(
        vocab_size=500, hidden_size=32, tie_word_embeddings=True, dtype="bfloat16"
    ).to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": config} if nested else config))
    for given in (path, tmp_path):
        _, data, _ = plan(capsys, "--hf-config", str(given))
        found = data["setup"]
        assert (found["vocab_size"], found["embed_dim"]) == (500, 32)
        assert (found["tied"], found["dtype"]) == (True, "bf16")
    _, data, _ = plan(capsys, "--hf-config", str(path), "--vocab-size", "512", "--no-tied")
    assert data["setup"]["vocab_size"] == 512
    assert data["setup"]["tied"] is False


def test_what_a_config_does_not_say_is_asked_for(tmp_path, capsys):
    GPT2Config(n_embd=48, vocab_size=300).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, data, _ = plan(capsys, "--hf-config", str(tmp_path))
    assert code == cli.USAGE
    assert data["error"] == "--tied or --no-tied must be given."
    _, data, _ = plan(capsys, "--hf-config", str(tmp_path), "--tied", "--dtype", "bf16")
    assert data["setup"]["embed_dim"] == 48


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), cli.USAGE, "--vocab-size and --embed-dim must be given."),
        ((*TABLE, "--tp", "0"), cli.USAGE, "`tp_size` must be an integer greater than or equal"),
        ((*TABLE, "--zero-stage", "0"), cli.USAGE, "`zero_stage` must be 1, 2 or 3 for bf16"),
        (
            (*TABLE, "--no-head", "--shard-logits"),
            cli.USAGE,
            "There is no head: leave it out",
        ),
        ((*TABLE, "--tied", "--no-head"), cli.USAGE, "`tied` must be false where there is no head"),
        (
            (*TABLE, "--tied", "--strategy", "embed", "--shard-logits"),
            cli.USAGE,
            "`shard_logits` must be false",
        ),
        ((*TABLE, "--gpus-per-node", "8"), cli.USAGE, "--gpus-per-node must come with --bandwidth"),
        ((*TABLE, "--latency", "5"), cli.USAGE, "--latency must come with --bandwidth"),
        ((*TABLE, "--memory", "-1"), cli.USAGE, "`memory` must be greater than 0, but is -1.0"),
        ((*TABLE, "--memory", "nan"), cli.USAGE, "`memory` must be greater than 0, but is nan"),
        ((*TABLE, "--bandwidth", "0"), cli.USAGE, "`bandwidth` must be greater than 0"),
        (("--hf-config", "nowhere"), cli.FAILED, "nowhere"),
    ],
)
def test_errors_say_what_is_wrong(capsys, arguments, code, message):
    found, data, _ = plan(capsys, *arguments)
    assert found == code
    assert message in data["error"]


@pytest.mark.parametrize("text", ["no json", "[]"])
def test_config_that_is_none_is_an_error(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    code, data, _ = plan(capsys, "--hf-config", str(tmp_path))
    assert code == cli.FAILED
    assert "must" in data["error"]


def test_config_in_fp16_needs_a_dtype(tmp_path, capsys):
    LlamaConfig(dtype="float16", tie_word_embeddings=False).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    code, data, _ = plan(capsys, "--hf-config", str(tmp_path))
    assert code == cli.USAGE
    assert "must be float32 or bfloat16, but is 'float16' instead. Give --dtype" in data["error"]


def test_warnings_say_what_does_not_fit(capsys):
    _, data, printed = plan(capsys, *TABLE, "--tp", "4", "--memory", "0.001", "--tokens", "10")
    assert [found["fits"] for found in data["strategies"]] == [False, True, True, True, True]
    assert data["warnings"] == []
    _, data, printed = plan(capsys, *TABLE, "--memory", "0.001", "--strategy", "none")
    assert data["warnings"][0].startswith("none needs 0.11 GiB at the peak of a step, but there")
    assert data["warnings"][0] in printed
    _, data, _ = plan(capsys, "--vocab-size", "3", "--embed-dim", "2", "--tied", "--tp", "4")
    assert data["warnings"] == ["1 of 4 ranks hold nothing of the table."]
    _, data, _ = plan(capsys, "--vocab-size", "3", "--embed-dim", "2", "--tp", "1000000000")
    assert data["warnings"] == ["999999998 of 1000000000 ranks hold nothing of the table."]
    nodes = ("--bandwidth", "1", "--gpus-per-node", "2")
    _, data, _ = plan(capsys, *TABLE, "--tp", "4", *nodes)
    assert [warning.split()[0] for warning in data["warnings"]] == ["4", "Links"]


def test_planning_imports_no_torch():
    code = (
        "import sys; from tp_embed import cli; "
        "assert not cli.main(['plan', '--vocab-size', '9', '--embed-dim', '3']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


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
    assert run(config) == 0
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
    chosen = data["strategies"][data["chosen"]]
    assert chosen["memory"]["peak"] == cost(setup, "vocab", shard_logits=True).peak
    assert chosen["sent"] == cost(setup, "vocab", shard_logits=True).sent


def test_choices_that_leave_tables_whole(compose, capsys):
    for overrides, strategy in [
        (["model=llama3_2_1b", "head=replicated"], "none"),
        (["model=llama3_8b", "head=replicated", "embedding=sharded"], "embed"),
    ]:
        assert run(compose("tp_size=2", "json=true", *overrides)) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["strategies"][data["chosen"]]["strategy"] == strategy
        assert data["setup"]["shard_head"] is False


def test_model_without_a_vocabulary_has_that_of_the_data(compose, capsys):
    assert run(compose("model=llama_tiny", "precision=fp32", "json=true")) == 0
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
