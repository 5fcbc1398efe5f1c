"""Matches names with the patterns in a checkpoint, which are untrusted regular expressions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

# Patterns that could backtrack forever are refused: no repeated groups, and few repetitions.
_MAX_LENGTH = 1000
_MAX_REPEATS = 3
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class Patterns:
    """A list of patterns. Most match a single name.

    :raises CheckpointError: ``values`` is no list of simple patterns.
    """

    def __init__(self, values: Any, path: Path) -> None:
        self._names: dict[str, str] = {}
        self._others: list[re.Pattern[str]] = []
        if not isinstance(values, (list, tuple, type(None))):
            raise CheckpointError(f"Patterns in `{path}` must be lists: {str(values)[:100]}.")
        for value in values or ():
            if not isinstance(value, str) or len(value) > _MAX_LENGTH:
                raise CheckpointError(
                    f"A pattern in `{path}` must be a short string, but is {str(value)[:100]!r}."
                )
            name = _ESCAPED.sub(r"\1", value[1:-1])
            if value == of_name(name):
                self._names[name] = value
            else:
                self._others.append(_compile(value, path))

    def find(self, name: str) -> str | None:
        """Returns the pattern that matches ``name``, or ``None``."""
        if name in self._names:
            return self._names[name]
        return next((other.pattern for other in self._others if other.match(name)), None)


def of_name(name: str) -> str:
    """Returns the pattern for one name, as AutoTP writes it."""
    return rf"^{re.escape(name)}$"


def _compile(pattern: str, path: Path) -> re.Pattern[str]:
    if _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > _MAX_REPEATS:
        raise CheckpointError(
            f"A pattern in `{path}` must be simple, but is `{pattern[:100]}`, which could take "
            "forever to match."
        )
    try:
        return re.compile(pattern)
    except re.error as e:
        raise CheckpointError(
            f"A pattern in `{path}` must be a regular expression, but `{pattern}` is none: {e}."
        ) from e
