"""``tp-embed`` inspects, converts and verifies checkpoints, and leaves nothing when it fails."""

from __future__ import annotations

import os
import termios
from contextlib import nullcontext, redirect_stderr, suppress

import pytest
import torch
from safetensors.torch import load_file

from cli_checkpoints import COLUMNS, ROWS, files, read_report, save_trained, tp_embed, trained
from tp_embed import cli


@pytest.fixture
def source(tmp_path):
    return save_trained(tmp_path)


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_inspect_shows_tables_and_with_all_every_tensor(source, capsys):
    assert tp_embed("inspect", source) == 0
    output = capsys.readouterr().out
    for part in ("embed_tokens.weight", f"{ROWS} x {COLUMNS}", "exp_avg_sq float32", "lm_head"):
        assert part in output
    assert "others: 2" in output
    assert "fc.bias" not in output

    assert tp_embed("inspect", source, "--all") == 0
    assert "fc.bias" in capsys.readouterr().out


def test_inspect_as_json_has_the_keys_of_the_docs(source, capsys):
    assert tp_embed("inspect", source, "--json") == 0
    report = read_report(capsys)
    assert set(report) == {
        *("format", "path", "step", "tp_size", "bytes", "tensors", "ties", "optimizer", "extra"),
        "notes",
    }
    assert (report["format"], report["step"], report["tp_size"]) == ("pt", 7, 1)
    assert report["ties"] == {"lm_head.weight": "embed_tokens.weight"}
    assert report["tensors"][0] == {
        "name": "embed_tokens.weight",
        "kind": "table",
        "shape": [ROWS, COLUMNS],
        "dtype": "float32",
        "layout": "whole",
        "cut": None,
        "states": {"weight": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"},
        "bytes": 3 * 4 * ROWS * COLUMNS,
    }
    assert report["bytes"] == sum(each["bytes"] for each in report["tensors"])


def test_converted_tensors_are_those_of_the_source(source, tmp_path, capsys):
    output = tmp_path / "hf"
    options = ("--to", "hf", "--dtype", "bfloat16", "--tp", 2)
    assert tp_embed("convert", source, output, *options) == 0
    printed = capsys.readouterr()
    assert "wrote" in printed.out
    assert "The state of the optimizer was left out" in printed.err
    assert "`hf` has no use for `--tp`" in printed.err
    (file,) = output.glob("*.safetensors")
    expected = torch.load(source)["model"]
    for name, tensor in load_file(file).items():
        assert torch.equal(tensor, expected[name].bfloat16())


@pytest.mark.parametrize("to", cli.FORMATS)
def test_every_format_is_written_recognised_and_the_same(source, tmp_path, capsys, to):
    output = tmp_path / ("out.pt" if to == "pt" else "out")
    rules = ("--rules", "fc.weight=1", "--rules", "fc.bias=replicated", "--rules", "*=vocab")
    assert tp_embed("convert", source, output, "--to", to, "--tp", 2, "--verify", *rules) == 0
    capsys.readouterr()
    assert tp_embed("inspect", output, "--json", *rules) == 0
    assert read_report(capsys)["format"] == to
    assert tp_embed("verify", source, output, "--weights-only", *rules) == 0


def test_rules_say_how_to_cut_and_may_be_in_a_file(source, tmp_path, capsys):
    rules = tmp_path / "rules.txt"
    rules.write_text("# of the layers\n\nfc.weight = 1  # columns\n*=replicated\n")
    base = ("convert", source, tmp_path / "out", "--to", "tp-embed", "--tp", 2)
    assert tp_embed(*base, "--json") == 1
    assert "--rules" in read_report(capsys)["error"]

    chosen = ("--rules", "fc.bias=0", "--rules", f"@{rules}", "--dim", "embed")
    assert tp_embed(*base, *chosen, "--json", "--verify") == 0
    report = read_report(capsys)
    assert (report["format"], report["tp_size"], report["verified"]) == ("tp-embed", 2, True)
    cuts = {each["name"]: each["cut"] for each in report["tensors"]}
    halves = [[[0, COLUMNS // 2]], [[COLUMNS // 2, COLUMNS]]]
    assert cuts["fc.bias"] == {"dim": 0, "ranges": halves}
    assert cuts["fc.weight"] == cuts["embed_tokens.weight"] == {"dim": 1, "ranges": halves}

    back = ("convert", tmp_path / "out", tmp_path / "back.pt", "--to", "pt")
    assert tp_embed(*back, "--quiet") == 0
    assert capsys.readouterr().out == ""
    both = ("--from", "pt", "--other-from", "tp-embed")
    assert tp_embed("verify", source, tmp_path / "out", *both) == 0
    assert "the same bit for bit" in capsys.readouterr().out


def test_dry_run_says_what_would_be_written_and_writes_nothing(source, tmp_path, capsys):
    before = files(tmp_path)
    arguments = ("convert", source, tmp_path / "out", "--to", "hf", "--dry-run")
    assert tp_embed(*arguments) == 0
    output = capsys.readouterr().out
    assert "would write" in output
    assert "embed_tokens.weight" in output
    assert tp_embed(*arguments, "--json") == 0
    report = read_report(capsys)
    assert report["dry_run"] is True
    assert report["bytes"] == 4 * (ROWS * COLUMNS + COLUMNS * COLUMNS + COLUMNS)
    assert report["warnings"] == ["The state of the optimizer was left out."]
    assert set(report) == {
        *("source", "source_format", "output", "format", "step", "tp_size", "bytes", "seconds"),
        *("dry_run", "verified", "tensors", "ties", "dropped", "warnings", "notes"),
    }
    assert files(tmp_path) == before


def test_output_is_replaced_only_when_asked(source, tmp_path, capsys):
    output = tmp_path / "out.pt"
    output.write_text("precious")
    arguments = ("convert", source, output, "--to", "pt")
    assert tp_embed(*arguments) == cli.FAILED
    assert "must be new" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert tp_embed(*arguments, "--overwrite") == 0
    assert torch.load(output)["step"] == 7


def test_interrupted_conversion_goes_on_with_resume(source, tmp_path, capsys):
    output = tmp_path / "out.pt"
    arguments = ["convert", str(source), str(output), "--to", "pt"]
    partial = tmp_path / ".out.pt.partial" / "out.pt"

    def interrupt(nbytes):
        raise KeyboardInterrupt

    values = vars(cli._parser().parse_args([*arguments, "--quiet"]))
    values["progress"] = lambda total: nullcontext(interrupt)
    assert cli.run(values.pop("command"), values) == cli.INTERRUPTED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("tp-embed: error: interrupted.")
    assert "--resume" in printed.err
    assert not output.exists()
    inode = partial.stat().st_ino

    assert cli.main([*arguments, "--resume", "--verify"]) == 0
    assert output.stat().st_ino == inode
    assert not partial.parent.exists()


def test_progress_is_shown_on_a_terminal_only(source, tmp_path, capsys):
    arguments = ("convert", source, "--to", "pt")
    assert tp_embed(*arguments, tmp_path / "a.pt") == 0
    assert capsys.readouterr().err == ""

    terminal, its_end = os.openpty()
    termios.tcsetwinsize(its_end, (24, 80))
    with open(its_end, "w") as stream, redirect_stderr(stream):
        assert tp_embed("verify", source, source, "--quiet") == 0
        assert tp_embed("verify", source, source) == 0
        assert tp_embed(*arguments, tmp_path / "b.pt") == 0
    shown = read_all(terminal)
    assert shown.count("100%") >= 2


def read_all(terminal):
    parts = []
    with suppress(OSError):  # Linux says so of a terminal that has no other end.
        while part := os.read(terminal, 4096):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_verify_finds_what_differs(source, tmp_path, capsys):
    saved = torch.load(source)
    saved["model"]["fc.bias"][3] += 1e-3
    saved["step"] = 8
    other = tmp_path / "other.pt"
    torch.save(saved, other)
    both = ("verify", source, other)

    assert tp_embed(*both) == cli.MISMATCH
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checkpoint (step): is 7 and 8"
    assert lines[1] == "fc.bias: differs by up to 0.001"
    assert "differ in 2" in lines[2]

    assert tp_embed(*both, "--json", "--weights-only") == cli.MISMATCH
    report = read_report(capsys)
    assert set(report) == {"same", "first", "second", "bytes", "seconds", "differences", "notes"}
    assert report["same"] is False
    (difference,) = report["differences"]
    assert difference.pop("largest") == pytest.approx(1e-3, rel=1e-3)
    assert difference == {"name": "fc.bias", "state": "weight", "what": "differs by up to 0.001"}

    assert tp_embed(*both, "--atol", "0.01", "--weights-only") == 0
    assert "within the tolerances" in capsys.readouterr().out
    assert tp_embed(*both, "--atol", "-1") == cli.USAGE


def test_verify_lists_twenty_differences_unless_all_are_asked_for(tmp_path, capsys):
    for number, path in enumerate(("a.pt", "b.pt")):
        torch.save({f"w{i}": torch.full((2,), number) for i in range(30)}, tmp_path / path)
    both = ("verify", tmp_path / "a.pt", tmp_path / "b.pt")
    assert tp_embed(*both) == cli.MISMATCH
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 22
    assert "10 more" in output
    assert tp_embed(*both, "--all") == cli.MISMATCH
    assert len(capsys.readouterr().out.splitlines()) == 31


def test_what_cannot_be_held_is_missing_unless_only_weights_are_compared(source, tmp_path, capsys):
    output = tmp_path / "hf"
    convert = ("convert", source, output, "--to", "hf", "--quiet")
    assert tp_embed(*convert) == 0
    both = ("verify", source, output, "--other-from", "hf")
    assert tp_embed(*both) == cli.MISMATCH
    assert f"fc.bias (exp_avg): is missing in `{output}`" in capsys.readouterr().out
    assert tp_embed(*both, "--weights-only") == 0


def test_padding_is_left_out_by_the_vocabulary_size(tmp_path, capsys):
    table = torch.randn(10, 4)
    torch.save({"wte.weight": torch.cat([table, torch.zeros(6, 4)])}, tmp_path / "padded.pt")
    torch.save({"wte.weight": table}, tmp_path / "plain.pt")
    both = ("--from", "pt", "--other-from", "pt")
    verify = ("verify", tmp_path / "padded.pt", tmp_path / "plain.pt", *both)
    assert tp_embed(*verify) == cli.MISMATCH
    assert "has the shapes (16, 4) and (10, 4)" in capsys.readouterr().out
    assert tp_embed(*verify, "--vocab-size", 10) == 0

    convert = ("convert", tmp_path / "padded.pt", tmp_path / "out.pt", "--to", "pt")
    assert tp_embed(*convert, "--vocab-size", 10, "--verify") == 0
    assert torch.equal(torch.load(tmp_path / "out.pt")["model"]["wte.weight"], table)


def test_code_in_a_file_does_not_run_unless_it_is_trusted(tmp_path, capsys):
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    torch.save({"w": torch.ones(2), "x": Evil(mark)}, path)
    arguments = ("inspect", path)
    assert tp_embed(*arguments) == cli.UNSAFE
    error = capsys.readouterr().err
    assert f"{os.mkdir.__module__}.mkdir" in error
    assert "--allow-unsafe-pickle" in error
    assert tp_embed(*arguments, "--json") == cli.UNSAFE
    assert read_report(capsys)["kind"] == "unsafe"
    convert = ("convert", path, tmp_path / "out", "--to", "hf")
    assert tp_embed(*convert) == cli.UNSAFE
    assert files(tmp_path) == ["evil.pt"]

    assert tp_embed(*arguments, "--allow-unsafe-pickle") == 0
    assert mark.is_dir()


def test_optimizer_of_unnamed_parameters_takes_names(tmp_path, capsys):
    path, names = tmp_path / "old.pt", tmp_path / "names.txt"
    torch.save(trained(names=False), path)
    arguments = ("inspect", path, "--json")
    assert tp_embed(*arguments) == cli.FAILED
    assert "--optimizer-names" in read_report(capsys)["error"]
    names.write_text("embed_tokens.weight\nfc.weight\nfc.bias\n")
    for value in ("embed_tokens.weight,fc.weight,fc.bias", f"@{names}"):
        assert tp_embed(*arguments, "--optimizer-names", value) == 0
        assert "exp_avg" in read_report(capsys)["tensors"][2]["states"]
