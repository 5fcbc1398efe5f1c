"""The command line ``tp-embed``: its subcommands, output and exit codes.

Each subcommand is a :class:`~tp_embed.command.Command` in a module that doesn't import torch, so
that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import tp_embed
from tp_embed.checkpoint import command as checkpoint_command
from tp_embed.checkpoint.choices import FORMATS
from tp_embed.command import (
    BROKEN_PIPE,
    FAILED,
    INTERRUPTED,
    MISMATCH,
    UNSAFE,
    USAGE,
    Command,
    CommandError,
    Report,
)
from tp_embed.doctor.command import DOCTOR
from tp_embed.monitor.command import REPORT
from tp_embed.plan.command import PLAN

__all__ = ["FAILED", "FORMATS", "INTERRUPTED", "MISMATCH", "UNSAFE", "USAGE", "fail", "main", "run"]

COMMANDS: Mapping[str, Command] = {
    command.name: command for command in (*checkpoint_command.COMMANDS, PLAN, DOCTOR, REPORT)
}

EXIT_CODES = """\
exit codes:
    0  success; a comparison found no difference
    1  failure: a checkpoint is damaged or can't be written as requested, a file is missing, or
       `doctor` found errors
    2  an option is missing or has an invalid value
    3  a comparison found differences
    4  refused: a checkpoint could run code, or reach files outside its directory
  130  interrupted; `convert` keeps what it has written for `--resume`
  141  the reader of the output is gone
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, by default from the command line.

    :returns: the exit code.
    :raises SystemExit: from :mod:`argparse`, after ``--help`` and wrong usage.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Some launchers prepend it; it is in the environment too.
    if arguments and re.fullmatch(r"--local[-_]rank=\d+", arguments[0]):
        del arguments[0]
    values = vars(_parser().parse_args(arguments))
    return run(values.pop("command"), values)


def run(command: str, values: Mapping[str, Any]) -> int:
    """Runs a command, and prints its report or error.

    :param values: the arguments of the command, and ``json``: whether to print a JSON object.
    :returns: the exit code.
    """
    arguments = dict(values)
    as_json = arguments.pop("json")
    try:
        return _run(COMMANDS[command], arguments, as_json)
    except KeyboardInterrupt:
        message = f"interrupted. {COMMANDS[command].interrupted}"
        return fail("interrupted", message, INTERRUPTED, as_json)
    except BrokenPipeError:
        # Python flushes stdout at exit, and would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(command: Command, arguments: Mapping[str, Any], as_json: bool) -> int:
    try:
        report = command.run(arguments)
    except CommandError as e:
        return fail(e.kind, str(e), e.code, as_json)
    except OSError as e:
        return fail("error", str(e), FAILED, as_json)
    try:
        _print_report(report, as_json, arguments.get("quiet", False))
    finally:
        report.printed()
    return report.code


def _print_report(report: Report, as_json: bool, quiet: bool) -> None:
    for warning in report.warnings:
        _print(f"tp-embed: warning: {warning}", sys.stderr)
    if as_json and report.data is not None:
        _print_json(report.data)
    elif not as_json and not quiet:
        for line in report.lines:
            _print(line, sys.stdout)
    sys.stdout.flush()


def fail(kind: str, message: str, code: int, as_json: bool) -> int:
    """Prints an error.

    :returns: ``code``.
    """
    message = " ".join(message.split())
    _print(f"tp-embed: error: {message}", sys.stderr)
    if as_json:
        _print_json({"error": message, "kind": kind})
        sys.stdout.flush()
    return code


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data, allow_nan=False))


def _print(line: str, stream: TextIO) -> None:
    """Prints ``line``, and escapes control characters, which names in a file may contain."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


class _Version(argparse.Action):
    """Prints the version. Looks it up only on demand, since that takes time."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(parser.prog, tp_embed.__version__)
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    options: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    description = "Tools for sharded embedding tables: checkpoints, plans, machines, runs."
    parser = argparse.ArgumentParser(
        prog="tp-embed", description=description, epilog=EXIT_CODES, **options
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        epilog = f"{command.epilog}\n{EXIT_CODES}"
        command.add_arguments(
            parsers.add_parser(
                command.name,
                help=command.help,
                description=command.description,
                epilog=epilog,
                **options,
            )
        )
    return parser
