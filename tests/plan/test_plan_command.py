"""``tp-embed plan``, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from matplotlib import image
from transformers import GPT2Config, LlamaConfig

from tp_embed import cli
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


def printed_plan(capsys, *arguments):
    """The table that is printed, as rows of cells, and the lines above and below it."""
    assert cli.main(["plan", *TABLE, *arguments]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("best: "))
    return heading, lines[:end], lines[end:]


def test_table_has_a_column_for_each_strategy_and_the_best_one(capsys):
    heading, rows, below = printed_plan(capsys, "--tp", "2", "--tokens", "10")
    assert heading.startswith("1000 x 64, untied head; TP 2, DP 1, ZeRO 1; bf16, adamw; 10 tokens")
    assert heading.endswith(", 90% distinct by Zipf's law")
    setup = Setup(1000, 64, tp_size=2, tokens=10)
    shown = [
        cost(setup, "none"),
        cost(setup, "embed"),
        cost(setup, "embed", dedup=True),
        cost(setup, "embed", dedup=True, shard_logits=True),
        cost(setup, "vocab"),
        cost(setup, "vocab", dedup=True),
    ]
    assert rows[0].split() == [each.strategy for each in shown]
    assert rows[1].split() == ["dedup"] * 3
    assert rows[2].split("  ")[-1] == "local logits"
    assert rows[3].split()[2:] == ["auto", "best"]
    (peaks,) = (row.split()[4:] for row in rows if row.startswith("  peak of a step"))
    assert [float(peak) for peak in peaks] == [
        pytest.approx(each.peak / 2**20, abs=1e-3) for each in shown
    ]
    ends = {rows[0].index("vocab") + 5, rows[3].index("best") + 4}
    assert ends <= {i for i, c in enumerate(rows[0] + " ") if c == " "}  # Columns are aligned.
    best, saved = below
    assert best == (
        "best: embed, dedup, local logits: sends the least among those that need the least memory"
    )
    assert saved.startswith("shard_logits is off: with it, embed would need ")


def test_options_choose_the_columns(capsys):
    _, rows, _ = printed_plan(capsys, "--tp", "2", "--dedup", "never")
    assert rows[0].split() == ["none", "embed", "embed", "vocab"]
    assert rows[1].split() == ["local", "logits"]
    _, rows, below = printed_plan(capsys, "--tp", "2", "--dedup", "always", "--shard-logits")
    assert rows[0].split() == ["none", "embed", "vocab"]
    assert rows[1].split() == ["dedup", "dedup"]
    assert rows[2].split() == ["local", "logits"] * 2
    assert len(below) == 1  # Nothing more to be saved.
    heading, rows, _ = printed_plan(
        capsys, "--tp", "2", "--output", "sequence", "--unique-share", "0.5", "--tokens", "64"
    )
    assert heading.endswith("64 tokens in 2 blocks, 50% distinct")
    assert [row[2:40].rstrip() for row in rows if "of table" in row] == [
        "forward, TP: all-to-all of table",
        "forward, TP: reduce-scatter of table",
        "backward, TP: all-gather of table",
        "backward, TP: all-to-all of table",
    ]


def test_json_has_all_strategies_whatever_is_shown(capsys):
    _, data, _ = plan(capsys, *TABLE, "--tp", "2", "--strategy", "vocab", "--dedup", "auto")
    assert [each["name"] for each in data["strategies"]] == [
        "none",
        *("embed", "embed, dedup", "embed, local logits", "embed, dedup, local logits"),
        *("vocab", "vocab, dedup", "vocab, local logits", "vocab, dedup, local logits"),
    ]
    chosen, best = (data["strategies"][data[key]] for key in ("chosen", "recommended"))
    assert (chosen["name"], best["name"]) == ("vocab", "embed, dedup, local logits")
    assert data["network"] is None
    setup = Setup(1000, 64, tp_size=2)
    off, on = cost(setup, "vocab"), cost(setup, "vocab", shard_logits=True)
    assert data["shard_logits_saves"] == {
        "peak": off.peak - on.peak,
        "sent": off.sent - on.sent,
        "seconds": None,
    }
    # On a CPU layers de-duplicate by themselves.
    _, data, _ = plan(capsys, *TABLE, "--tp", "2", "--device", "cpu", "--bandwidth", "1")
    assert data["strategies"][data["chosen"]]["name"] == "embed, dedup"
    assert data["shard_logits_saves"]["seconds"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shard-logits",),
        ("--tied", "--strategy", "embed"),
        ("--no-head",),
        ("--strategy", "none"),
    ],
    ids=" ".join,
)
def test_there_is_not_always_something_to_save(capsys, arguments):
    _, data, _ = plan(capsys, *TABLE, "--tp", "2", *arguments)
    assert data["shard_logits_saves"] is None


def test_chart_has_the_costs_of_growing_gangs(capsys, tmp_path):
    path = tmp_path / "costs.svg"
    arguments = ("--tp", "12", "--dp", "2", "--bandwidth", "1", "--owner-share", "0.25")
    _, data, _ = plan(capsys, *TABLE, *arguments, "--chart", str(path))
    chart = data["chart"]
    assert chart["file"] == str(path)
    assert chart["tp_sizes"] == [1, 2, 4, 8, 12]
    setup = Setup(1000, 64, tp_size=4, dp_size=2, owner_share=0.25)
    assert chart["panels"]["Peak of a step (GiB)"]["embed"][2] == cost(setup, "embed").peak / 2**30
    planned = cost(setup, "vocab", dedup=True)
    assert chart["panels"]["Sent in a step (GiB)"]["vocab, dedup"][2] == planned.sent / 2**30
    seconds = planned.seconds(setup, Network(1e9))
    assert chart["panels"]["Time to send (ms)"]["vocab, dedup"][2] == pytest.approx(1e3 * seconds)
    root = ElementTree.parse(path).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == svg + "svg"
    names = [each["name"] for each in data["strategies"] if not each["shard_logits"]]
    assert set(names) < {text.text for text in root.iter(svg + "text")}
    lines = [g for g in root.iter(svg + "g") if g.get("id", "").startswith("line-")]
    assert len(lines) == len(chart["panels"]) * len(chart["panels"]["Time to send (ms)"])
    assert all(len(list(line.iter(svg + "use"))) == 5 for line in lines)


def test_chart_may_be_a_png(capsys, tmp_path):
    path = tmp_path / "costs.PNG"
    assert plan(capsys, *TABLE, "--chart", str(path))[0] == 0
    pixels = image.imread(path)
    assert pixels.shape[0] > 300
    assert len(set(map(tuple, pixels.reshape(-1, pixels.shape[2])))) > 20


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_chart_without_matplotlib_says_what_to_install(tmp_path, name):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from tp_embed import cli; "
        f"sys.exit(cli.main(['plan', *{TABLE}, '--chart', {str(tmp_path / name)!r}]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=False
    )
    assert found.returncode == cli.FAILED
    assert "pip install 'tp-embed[cli]'" in found.stderr
    assert found.stdout == ""
    assert not list(tmp_path.iterdir())


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
        (
            (*TABLE, "--no-head", "--fuse-loss"),
            cli.USAGE,
            "`fuse_loss` must be false where there is no head",
        ),
        (
            (*TABLE, "--tied", "--strategy", "vocab", "--shard-logits", "--fuse-loss"),
            cli.USAGE,
            "`shard_logits` must be false with `fuse_loss`",
        ),
        ((*TABLE, "--gpus-per-node", "8"), cli.USAGE, "--gpus-per-node must come with --bandwidth"),
        ((*TABLE, "--latency", "5"), cli.USAGE, "--latency must come with --bandwidth"),
        ((*TABLE, "--memory", "-1"), cli.USAGE, "`memory` must be greater than 0, but is -1.0"),
        ((*TABLE, "--memory", "nan"), cli.USAGE, "`memory` must be greater than 0, but is nan"),
        ((*TABLE, "--bandwidth", "0"), cli.USAGE, "`bandwidth` must be greater than 0"),
        ((*TABLE, "--chart", "a.pdf"), cli.USAGE, "--chart must be a file that ends in .svg or"),
        ((*TABLE, "--chart", "nowhere/a.svg"), cli.FAILED, "nowhere"),
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
    fits = [found["fits"] for found in data["strategies"]]
    assert fits == [found["strategy"] != "none" for found in data["strategies"]]
    assert data["warnings"] == []
    _, data, printed = plan(capsys, *TABLE, "--memory", "0.001", "--strategy", "none")
    assert data["warnings"][0].startswith("none needs 0.11 GiB at the peak of a step, but only")
    assert data["warnings"][0] in printed
    _, data, _ = plan(capsys, "--vocab-size", "3", "--embed-dim", "2", "--tied", "--tp", "4")
    assert data["warnings"] == ["1 of 4 ranks hold no part of the table."]
    _, data, _ = plan(capsys, "--vocab-size", "3", "--embed-dim", "2", "--tp", "1000000000")
    assert data["warnings"] == ["999999997 of 1000000000 ranks hold no part of the table."]
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


def test_options_have_short_names_too(capsys):
    printed = []
    for vocab, dim, zero in (("--vocab", "--dim", "--zero"), (*TABLE[::2], "--zero-stage")):
        assert cli.main(["plan", vocab, "1000", dim, "64", zero, "2"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
