"""What a command of ``tp-embed`` consists of. :mod:`tp_embed.cli` lists them and runs one.

A module that holds a :class:`Command` is imported for ``tp-embed --help``: torch, and whatever else
takes time to import, has to be imported by its ``run``.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAILED, USAGE, MISMATCH, UNSAFE, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 130, 141


@dataclass(frozen=True)
class Report:
    """What a command has to say.

    :param data: all of it, as JSON can hold it; nothing for a rank that leaves it to another.
    :param lines: the same for people.
    :param warnings: what people must not miss; they go to stderr.
    :param code: the exit code.
    :param printed: is called when all has been printed.
    """

    data: Mapping[str, Any] | None
    lines: Sequence[str]
    warnings: Sequence[str] = ()
    code: int = 0
    printed: Callable[[], object] = lambda: None


class CommandError(Exception):
    """A command cannot do what it was asked for.

    :param kind: a word for scripts that read ``--json``.
    :param code: the exit code.
    """

    def __init__(self, message: str, kind: str = "error", code: int = FAILED) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code


class WrongUsageError(CommandError):
    """An option has a value that it cannot have."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "usage", USAGE)


class MissingPackageError(CommandError, ImportError):
    """An optional package isn't installed."""


@dataclass(frozen=True)
class Command:
    """A command.

    :param name: as it is typed.
    :param help: its line in ``tp-embed --help``.
    :param description: the first sentence of its own help.
    :param add_arguments: gives its parser the options. ``--json``, and ``--quiet`` if it is there,
        are seen to by :mod:`tp_embed.cli`.
    :param run: takes the other values by name.
    :param epilog: the end of its own help.
    :param interrupted: what is to be said after Ctrl-C.
    :raises CommandError: ``run`` raises it; an :class:`OSError` is taken for one too.
    """

    name: str
    help: str
    description: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Mapping[str, Any]], Report]
    epilog: str = ""
    interrupted: str = ""
