"""Defines ``tp-embed inspect``, ``convert`` and ``verify``: their options and exit codes.

:mod:`tp_embed.checkpoint.actions` runs them.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

from tp_embed.command import MISMATCH, UNSAFE, Command, CommandError, Report

from .choices import DIMS, FORMATS, NanPolicy

_RULES = """\
rules:
  `--rules PATTERN=HOW` says how Parameters are cut over tensor-parallel ranks, where a checkpoint
  does not. The first rule whose PATTERN (a glob) matches the whole name applies. HOW is
    replicated    every rank has all of it
    vocab, embed  a vocabulary table or head, cut along its rows, or its columns
    DIM           cut along dimension DIM, from 0
    DIM/N         cut each of N equal blocks that are stacked along DIM
    DIM:A,B,...   the same for blocks of sizes A, B, ...
  `--rules @FILE` reads one rule per line; `#` starts a comment.
"""


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], object]]:
    """Shows a bar of ``total`` bytes on a terminal, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda nbytes: None
        return
    # `disable=None`: disabled unless stderr is a terminal.
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield bar.update


def _run(name: str, values: Mapping[str, Any]) -> Report:
    from . import actions
    from .errors import CheckpointError, MismatchError, UnsafeCheckpointError

    arguments = dict(values)
    quiet = arguments.pop("quiet", False)
    if not quiet and name != "inspect":
        arguments["progress"] = progress_bar
    try:
        report: Report = getattr(actions, name)(**arguments)
    except MismatchError as e:
        raise CommandError(str(e), "mismatch", MISMATCH) from e
    except UnsafeCheckpointError as e:
        raise CommandError(str(e), "unsafe", UNSAFE) from e
    except CheckpointError as e:
        raise CommandError(str(e)) from e
    return report


def _add_inspect(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a file or directory")
    parser.add_argument("--all", action="store_true", dest="show_all", help="list all tensors")
    _add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _add_convert(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a file or directory")
    parser.add_argument("output", metavar="DST", help="a new name, or an empty directory")
    _add_writing(parser)
    _add_reading(parser)
    _add_printing(parser, "list all tensors, with `--dry-run`")


def _add_verify(parser: ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a file or directory")
    parser.add_argument("second", metavar="B", help="a file or directory")
    parser.add_argument("--rtol", type=float, metavar="X", help="relative, as in torch.isclose")
    parser.add_argument("--atol", type=float, metavar="X", help="absolute, as in torch.isclose")
    _add_reading(parser)
    parser.add_argument(
        "--other-from", choices=FORMATS, dest="other_format", help="as --from, for B"
    )
    parser.add_argument("--other-tag", metavar="TAG", help="as --tag, for B")
    _add_printing(parser, "list all differences, not only 20")


def _add_reading(parser: ArgumentParser) -> None:
    """Adds the options of :func:`~tp_embed.checkpoint.options.read_options`, and the format."""
    group = parser.add_argument_group("how to read")
    group.add_argument(
        "--from",
        choices=FORMATS,
        dest="source_format",
        help="the format; by default detected",
    )
    group.add_argument("--tag", help="which checkpoint of a directory; by default the latest")
    group.add_argument(
        "--rules", action="append", default=[], metavar="PATTERN=HOW", help="see below; repeatable"
    )
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="the rows of tables, without padding"
    )
    group.add_argument(
        "--optimizer-names",
        metavar="NAMES",
        help="comma-separated names of the optimizer's Parameters, in its order, if the checkpoint "
        "lacks them; or @FILE, with one per line",
    )
    group.add_argument("--weights-only", action="store_true", help="leave out optimizer state")
    group.add_argument(
        "--allow-unsafe-pickle",
        action="store_true",
        help="run the code in a pickled file: only if you trust whoever wrote it",
    )


def _add_writing(parser: ArgumentParser) -> None:
    """Adds the options of :func:`~tp_embed.checkpoint.actions.convert`."""
    group = parser.add_argument_group("what to write")
    group.add_argument("--to", choices=FORMATS, required=True, help="the format")
    group.add_argument(
        "--tp", type=int, metavar="N", help="number of ranks; by default as the source"
    )
    group.add_argument("--dim", choices=DIMS, help="how to cut vocabulary tables")
    group.add_argument("--dtype", help="of weights, as bfloat16; by default as the source")
    group.add_argument(
        "--nan",
        choices=get_args(NanPolicy),
        default="keep",
        help="keep or refuse NaNs",
    )
    group.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest file of hf, such as 500MiB; by default %(default)s",
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
    group = parser.add_argument_group("how to write")
    group.add_argument("--dry-run", action="store_true", help="say what would be written")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run")
    group.add_argument("--overwrite", action="store_true", help="replace DST, atomically")
    group.add_argument(
        "--verify", action="store_true", help="read it back and compare before renaming it to DST"
    )


def _add_printing(parser: ArgumentParser, show_all: str) -> None:
    group = parser.add_argument_group("what to print")
    group.add_argument("--all", action="store_true", dest="show_all", help=show_all)
    group.add_argument("--json", action="store_true", help="print a JSON object")
    group.add_argument("--quiet", action="store_true", help="print only warnings and errors")


COMMANDS = (
    Command(
        "inspect",
        "show what is in a checkpoint",
        "Shows what is in a checkpoint.",
        _add_inspect,
        partial(_run, "inspect"),
        epilog=_RULES,
    ),
    Command(
        "convert",
        "convert a checkpoint to another format, tensor-parallel size or dtype",
        "Converts a checkpoint. DST appears complete or not at all.",
        _add_convert,
        partial(_run, "convert"),
        epilog=_RULES,
        interrupted="What was written is kept: go on with `--resume`.",
    ),
    Command(
        "verify",
        "compare two checkpoints, of any formats and tensor-parallel sizes",
        "Compares all tensors of two checkpoints: without tolerances bit for bit.",
        _add_verify,
        partial(_run, "verify"),
        epilog=_RULES,
    ),
)
