"""The command ``tp-embed``: its help, its errors and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from cli_checkpoints import read_report, save_trained, tp_embed
from tp_embed import cli
from tp_embed.checkpoint import formats
from tp_embed.checkpoint.options import parse_size
from tp_embed.command import BROKEN_PIPE, WrongUsageError

COMMAND = [sys.executable, "-m", "tp_embed"]


@pytest.fixture
def source(tmp_path):
    return save_trained(tmp_path)


def test_help_does_not_import_torch_and_names_options_and_exit_codes():
    script = """
import sys
import termios
from tp_embed.cli import main
for command in ("", "inspect", "convert", "verify", "plan", "doctor"):
    try:
        main([*command.split(), "--help"])
    except SystemExit as e:
        assert e.code == 0
    assert "torch" not in sys.modules
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    options = (
        "--max-shard-size",
        "--weights-only",
        "--allow-unsafe-pickle",
        "--zero-stage",
        "--fix",
    )
    for name in (*options, "DIM/N", "  141  "):
        assert name in output


def test_command_is_installed():
    command = Path(sys.executable).with_name("tp-embed")
    output = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "convert" in output


def test_version_is_printed_without_torch():
    script = """
import sys
from tp_embed.cli import main
try:
    main(["--version"])
except SystemExit as e:
    assert e.code == 0
assert "torch" not in sys.modules
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output == f"tp-embed {version('tp-embed')}\n"


def test_formats_of_the_command_are_those_of_the_library():
    assert set(cli.FORMATS) == set(formats.FORMATS)


def test_failures_are_one_line(source, tmp_path, capsys):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(source.read_bytes()[:-100])
    for path in (damaged, tmp_path / "missing.pt"):
        assert tp_embed("inspect", path) == cli.FAILED
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("tp-embed: error: ")
        assert len(printed.err.splitlines()) == 1
        assert tp_embed("inspect", path, "--json") == cli.FAILED
        report = read_report(capsys)
        assert report["kind"] == "error"
        assert str(path) in report["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", "0"), "`--tp` must be in [1, 65536], but is 0"),
        (("--dtype", "float31"), "float31"),
        (("--max-shard-size", "5XB"), "5XB"),
        (("--rules", "a=b"), "PATTERN=HOW"),
        (("--rules", "@nowhere.txt"), "nowhere.txt"),
        (("--optimizer-names", "@nowhere.txt"), "nowhere.txt"),
        (("--vocab-size", "-3"), "--vocab-size"),
        (("--hf-config", "nowhere"), "must be a directory"),
    ],
)
def test_options_with_wrong_values_are_named(source, tmp_path, capsys, options, message):
    base = ("convert", source, tmp_path / "out", "--to", "hf", "--json")
    assert tp_embed(*base, *options) == cli.USAGE
    report = read_report(capsys)
    assert message in report["error"]
    assert report["kind"] == "usage"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--local_rank=0",),
        ("--local_rank", "inspect"),
        ("doctor", "--tp", "0"),
        ("doctor", "--timeout", "inf"),
        ("convert", "a", "b"),
        ("convert", "a", "b", "--to", "onnx"),
        ("convert", "a", "b", "--to", "hf", "--dim", "rows"),
        ("convert", "a", "b", "--to", "hf", "--zero-stage", "4"),
        ("convert", "a", "b", "--to", "hf", "--dry"),
        ("verify", "a"),
        ("inspect", "a", "--from", "onnx"),
    ],
)
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        tp_embed(*arguments)
    assert caught.value.code == cli.USAGE
    assert "usage: tp-embed" in capsys.readouterr().err


def test_control_characters_of_names_are_escaped(tmp_path, capsys):
    path = tmp_path / "names.pt"
    torch.save({"\x1b[2J\nw.weight": torch.ones(2)}, path)
    assert tp_embed("inspect", path, "--all") == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert r"\x1b[2J\nw.weight" in output


def test_reader_that_goes_away_is_no_error(source):
    command = [*COMMAND, "inspect", source, "--all"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == BROKEN_PIPE


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5 kib", 1536),
        ("1000000", 10**6),
        ("7B", 7),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0", "0.1", "1e9", "nan"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(WrongUsageError, match="number of bytes greater than 0"):
        parse_size(text)
