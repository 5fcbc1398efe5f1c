"""The interface of the commands of ``tp-embed``, which :mod:`tp_embed.cli` lists and runs.

``tp-embed --help`` imports every module with a :class:`Command`: import torch, and whatever else is
slow to import, in ``run``.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAILED, USAGE, MISMATCH, UNSAFE, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 130, 141


@dataclass(frozen=True)
class Report:
    """The output of a command.

    :param data: the whole report for JSON; ``None`` on ranks that don't report.
    :param lines: the same for people.
    :param warnings: important messages for stderr.
    :param code: the exit code.
    :param printed: called after everything was printed.
    """

    data: Mapping[str, Any] | None
    lines: Sequence[str]
    warnings: Sequence[str] = ()
    code: int = 0
    printed: Callable[[], object] = lambda: None


class CommandError(Exception):
    """A command failed.

    :param kind: the kind of error, for scripts that read ``--json``.
    :param code: the exit code.
    """

    def __init__(self, message: str, kind: str = "error", code: int = FAILED) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code


class WrongUsageError(CommandError):
    """An option has an invalid value."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "usage", USAGE)


class MissingPackageError(CommandError, ImportError):
    """An optional package isn't installed."""


@dataclass(frozen=True)
class Command:
    """A command.

    :param name: its name on the command line.
    :param help: its line in ``tp-embed --help``.
    :param description: the first sentence of its own help.
    :param add_arguments: adds the options to its parser. :mod:`tp_embed.cli` handles ``--json``,
        and ``--quiet`` if it exists.
    :param run: runs the command, given the other values by name. Raises :class:`CommandError` on
        failure; an :class:`OSError` counts as one too.
    :param epilog: the end of its own help.
    :param interrupted: the message after Ctrl-C.
    """

    name: str
    help: str
    description: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Mapping[str, Any]], Report]
    epilog: str = ""
    interrupted: str = ""
