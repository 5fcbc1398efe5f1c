"""The command ``tp-embed``: inspects, converts and compares checkpoints.

What the commands do is in :mod:`tp_embed.checkpoint.commands`; here are their options, and what
becomes of their reports and errors. torch is imported when a command runs, not for ``--help``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

FORMATS = ("tp-embed", "universal", "deepspeed", "dcp", "megatron", "fairseq2", "hf", "pt")
DIMS = ("vocab", "embed")
NAN_POLICIES = ("keep", "refuse")

FAILED, USAGE, MISMATCH, UNSAFE, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 130, 141

EXIT_CODES = """\
exit codes:
    0  done; what was compared is the same
    1  failed: a checkpoint is damaged or cannot be written as asked for, or a file is not there
    2  an option is missing, or has a value that it cannot have
    3  what was compared differs
    4  refused: a checkpoint could run code, or reach files outside of its directory
  130  interrupted; what `convert` has written is kept for `--resume`
  141  whoever read the output is gone
"""

_RULES = """\
rules:
  `--rules PATTERN=HOW` says how Parameters are cut over tensor-parallel ranks, where a checkpoint
  does not. The first rule counts whose PATTERN, as of file names, matches the whole name. HOW is
    replicated    every rank has all of it
    vocab, embed  a vocabulary table or head, cut along its rows, or its columns
    DIM           cut along dimension DIM, from 0
    DIM/N         the same for each of N blocks of one size that are stacked along DIM
    DIM:A,B,...   the same for blocks of the sizes A, B, ...
  `--rules @FILE` takes one rule from each line, but for comments from `#` on.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, by default that of the command line.

    :returns: the exit code.
    :raises SystemExit: as :mod:`argparse` does, after ``--help`` and wrong usage.
    """
    values = vars(_parser().parse_args(arguments))
    return run(values.pop("command"), values)


def run(command: str, values: Mapping[str, Any]) -> int:
    """Runs a command of :mod:`tp_embed.checkpoint.commands`, and prints its report or its error.

    :param values: its arguments; also ``json`` and ``quiet``, how to print.
    :returns: the exit code.
    """
    as_json = values["json"]
    try:
        return _run(command, values)
    except KeyboardInterrupt:
        hint = " What was written is kept: go on with `--resume`." if command == "convert" else ""
        return fail("interrupted", f"interrupted.{hint}", INTERRUPTED, as_json)
    except BrokenPipeError:
        # Python writes what is left once more as it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], object]]:
    """A bar of ``total`` bytes on the terminal, if there is one and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda nbytes: None
        return
    # `None` is for: if this is no terminal.
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield bar.update


def _run(command: str, values: Mapping[str, Any]) -> int:
    from .checkpoint import CheckpointError, MismatchError, UnsafeCheckpointError, commands
    from .checkpoint.options import UsageError

    arguments = dict(values)
    as_json, quiet = arguments.pop("json"), arguments.pop("quiet")
    if not quiet and command != "inspect":
        arguments["progress"] = progress_bar
    try:
        report = getattr(commands, command)(**arguments)
    except UsageError as e:
        return fail("usage", str(e), USAGE, as_json)
    except MismatchError as e:
        return fail("mismatch", str(e), MISMATCH, as_json)
    except UnsafeCheckpointError as e:
        return fail("unsafe", str(e), UNSAFE, as_json)
    except (CheckpointError, OSError) as e:
        return fail("error", str(e), FAILED, as_json)
    for warning in report.warnings:
        _print(f"tp-embed: warning: {warning}", sys.stderr)
    if as_json:
        _print_json(report.data)
    elif not quiet:
        for line in report.lines:
            _print(line, sys.stdout)
    sys.stdout.flush()
    return 0 if report.same else MISMATCH


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
    """Prints ``line``; control characters, which names in a file may have, as escapes."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _parser() -> argparse.ArgumentParser:
    def described(**kwargs: Any) -> dict[str, Any]:
        return {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
            **kwargs,
        }

    parser = argparse.ArgumentParser(
        prog="tp-embed",
        **described(description="Inspects, converts and compares checkpoints.", epilog=EXIT_CODES),
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    epilog = f"{_RULES}\n{EXIT_CODES}"

    command = commands.add_parser(
        "inspect",
        help="show what is in a checkpoint",
        **described(description="Shows what is in a checkpoint.", epilog=epilog),
    )
    command.add_argument("path", metavar="PATH", help="a file or directory")
    command.add_argument("--all", action="store_true", dest="show_all", help="list all tensors")
    _add_reading(command)
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.set_defaults(quiet=False)

    command = commands.add_parser(
        "convert",
        help="convert a checkpoint to another format, tensor-parallel size or dtype",
        **described(
            description="Converts a checkpoint. DST is there as a whole in the end, or not at all.",
            epilog=epilog,
        ),
    )
    command.add_argument("source", metavar="SRC", help="a file or directory")
    command.add_argument("output", metavar="DST", help="a new name, or an empty directory")
    _add_writing(command)
    _add_reading(command)
    _add_printing(command, "list all tensors, with `--dry-run`")

    command = commands.add_parser(
        "verify",
        help="compare two checkpoints, of any formats and tensor-parallel sizes",
        **described(
            description="Compares all tensors of two checkpoints: without tolerances bit for bit.",
            epilog=epilog,
        ),
    )
    command.add_argument("first", metavar="A", help="a file or directory")
    command.add_argument("second", metavar="B", help="a file or directory")
    command.add_argument("--rtol", type=float, metavar="X", help="relative, as of torch.isclose")
    command.add_argument("--atol", type=float, metavar="X", help="absolute, as of torch.isclose")
    _add_reading(command)
    command.add_argument(
        "--other-from", choices=FORMATS, dest="other_format", help="as --from, for B"
    )
    command.add_argument("--other-tag", metavar="TAG", help="as --tag, for B")
    _add_printing(command, "list all differences, not only 20")
    return parser


def _add_reading(command: argparse.ArgumentParser) -> None:
    """The options of :func:`~tp_embed.checkpoint.options.read_options`, and the format."""
    group = command.add_argument_group("how to read")
    group.add_argument(
        "--from",
        choices=FORMATS,
        dest="source_format",
        help="the format, if it is not to be recognised",
    )
    group.add_argument("--tag", help="which checkpoint of a directory, if not the latest")
    group.add_argument(
        "--rules", action="append", default=[], metavar="PATTERN=HOW", help="see below; repeatable"
    )
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="the rows of tables, without padding"
    )
    group.add_argument(
        "--optimizer-names",
        metavar="NAMES",
        help="the Parameters of an optimizer that does not say their names, in its order, with "
        "commas between them; or @FILE, with one in each line",
    )
    group.add_argument(
        "--weights-only", action="store_true", help="leave out what the optimizer holds"
    )
    group.add_argument(
        "--allow-unsafe-pickle",
        action="store_true",
        help="run the code that a pickled file asks for: only if you trust whoever wrote it",
    )


def _add_writing(command: argparse.ArgumentParser) -> None:
    """The options of :func:`~tp_embed.checkpoint.commands.convert`."""
    group = command.add_argument_group("what to write")
    group.add_argument("--to", choices=FORMATS, required=True, help="the format")
    group.add_argument(
        "--tp", type=int, metavar="N", help="for how many ranks; by default as the source"
    )
    group.add_argument("--dim", choices=DIMS, help="along what to cut vocabulary tables")
    group.add_argument("--dtype", help="of weights, as bfloat16; by default as the source")
    group.add_argument(
        "--nan", choices=NAN_POLICIES, default="keep", help="whether NaNs are kept or refused"
    )
    group.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of the files of hf, as 500MiB; by default %(default)s",
    )
    group.add_argument("--hf-config", metavar="DIR", help="with config.json and the like, for hf")
    group.add_argument(
        "--zero-stage",
        type=int,
        choices=range(4),
        default=1,
        help="of deepspeed; by default %(default)s",
    )
    group.add_argument(
        "--dp",
        type=int,
        default=1,
        metavar="N",
        help="data-parallel ranks of deepspeed; by default %(default)s",
    )
    group = command.add_argument_group("how to write")
    group.add_argument("--dry-run", action="store_true", help="say what would be written")
    group.add_argument("--resume", action="store_true", help="go on with what was interrupted")
    group.add_argument("--overwrite", action="store_true", help="replace DST, at one moment")
    group.add_argument(
        "--verify", action="store_true", help="read it back and compare before it gets its name"
    )


def _add_printing(command: argparse.ArgumentParser, show_all: str) -> None:
    group = command.add_argument_group("what to print")
    group.add_argument("--all", action="store_true", dest="show_all", help=show_all)
    group.add_argument("--json", action="store_true", help="print a JSON object")
    group.add_argument("--quiet", action="store_true", help="print only warnings and errors")
