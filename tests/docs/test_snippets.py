"""What the docs show runs: blocks of Python on two ranks by DeepSpeed's launcher, tutorials as a
reader would follow them. Commands that need a cluster or hours are checked word by word."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from forks import run_script
from launch import BIN, ROOT, environment, free_port, remove_shared_memory, run
from snippets import TUTORIALS, blocks, blocks_of, python_blocks
from tp_embed import cli

JOB = ROOT / "tests" / "jobs" / "snippets_job.py"
MARKS = re.compile(r"no-run|lines-of=\S+")
PYTHON_BLOCKS = [block.name for block in python_blocks()]
COPIED = [b for b in blocks("python") if any(m.startswith("lines-of=") for m in b.marks)]
COMMANDS = [b for b in blocks("bash") if b.page.parent != TUTORIALS or b.marks]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What each block of Python has raised on each rank."""
    directory = tmp_path_factory.mktemp("snippets")
    run_script(JOB, directory, cwd=directory)
    return [json.loads((directory / f"errors-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", PYTHON_BLOCKS)
def test_python_block_runs_on_two_ranks(name, errors):
    for rank in range(2):
        assert errors[rank][name] is None, f"rank {rank}: {errors[rank][name]}"


def test_first_block_of_the_readme_runs_in_one_process(tmp_path):
    block = next(b for b in blocks_of(ROOT / "README.md") if b.language == "python")
    output = run([sys.executable, "-c", block.text], cwd=tmp_path)
    assert "strategy 'embed'" in output
    assert "(0): ShardedEmbedding(1000, 64" in output


@pytest.mark.parametrize("block", COPIED, ids=lambda block: block.name)
def test_lines_of_a_script(block):
    (mark,) = block.marks
    script = (ROOT / mark.removeprefix("lines-of=")).read_text()
    rest = iter([line.strip().removesuffix(",") for line in script.splitlines()])
    for line in block.text.splitlines():
        assert line.strip().removesuffix(",") in rest, line  # `in` goes on from the line before.


def test_all_marks_are_known():
    marked = [b for language in ("python", "bash") for b in blocks(language) if b.marks]
    assert marked
    for block in marked:
        assert all(MARKS.fullmatch(mark) for mark in block.marks), block.name


def shell(command, cwd):
    """What a reader's shell prints, with the environment of `make`."""
    result = subprocess.run(
        ["bash", "-euc", command], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def change(script: Path, diff: str) -> None:
    lines = [line for line in diff.splitlines() if line != " "]
    old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    assert script.read_text().count(old) == 1, old
    script.write_text(script.read_text().replace(old, new))


def follow(page: Path, directory: Path) -> list[str]:
    """Does what a tutorial says, and returns what each of its commands printed."""
    printed = []
    for block in blocks_of(page):
        if block.marks:
            continue
        if block.language == "python":
            (directory / block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text)
        elif block.language == "diff":
            change(directory / "train.py", block.text)
        elif block.language == "bash":
            port = f"--master_port={free_port()}"  # Others may train on this machine.
            command = re.sub(r"^deepspeed", f"deepspeed {port}", block.text)
            printed.append(shell(command, directory))
            remove_shared_memory([port])
    return printed


def test_tutorials_of_a_script_and_its_checkpoint(tmp_path):
    alone, sharded, by_rows = follow(TUTORIALS / "deepspeed.md", tmp_path)
    losses = re.findall(r"step \d: loss \S+", alone)
    assert len(losses) == 4
    assert re.findall(r"step \d: loss \S+", sharded) == losses
    assert re.findall(r"step \d: loss \S+", by_rows) == losses
    report = next(b for b in blocks_of(TUTORIALS / "deepspeed.md") if b.language == "text")
    assert report.text.strip() in sharded
    assert "(1000 x 64): strategy 'vocab'" in by_rows

    inspected, *_, verified, _ = follow(TUTORIALS / "convert.md", tmp_path)
    assert "deepspeed" in inspected
    assert "same" in verified
    assert list((tmp_path / "hf").glob("*.safetensors"))
    assert not (tmp_path / "whole").exists()  # A dry run.


def test_tutorial_of_several_nodes(tmp_path):
    (planned,) = follow(TUTORIALS / "nodes.md", tmp_path)
    assert "vocab" in planned


def commands_of(text: str) -> list[list[str]]:
    """The commands of a block, without comments and variables that are set for them."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    for command in commands:
        while command and re.match(r"[A-Z_]+=", command[0]):
            del command[0]
    return [command for command in commands if command]


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.name)
def test_commands_are_ones_that_exist(block):
    for command in commands_of(block.text):
        program, *arguments = command
        if program == "tp-embed":
            cli._parser().parse_args(arguments)
        elif "tp_embed" in arguments:
            cli._parser().parse_args(arguments[arguments.index("tp_embed") + 1 :])
        elif program == "make":
            check_target(arguments[0])
        elif program == "pip":
            check_extras(arguments[-1])
        elif program.startswith("examples/"):
            assert os.access(ROOT / program, os.X_OK), program
        else:
            assert program in ("pytest", "sbatch") or (BIN / Path(program).name).exists(), program
        for path in filter(re.compile(r"(examples|benchmarks|tests)/\S+\.\w+").fullmatch, command):
            assert (ROOT / path).exists(), path


def check_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def check_extras(requirement: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = re.findall(r"\w+", requirement)
    assert set(extras) <= set(known), requirement
