"""Encodes plain Python values as strict JSON, and decodes them."""

from __future__ import annotations

import math
from typing import Any

from ..errors import CheckpointError


def to_json(what: str, value: Any) -> Any:
    """Encodes a plain Python value as strict JSON. :func:`from_json` restores it with the same
    types. Types that JSON lacks become an object with one key that begins with ``$``.

    :param what: the value's name in messages.
    :raises CheckpointError: ``value`` is no plain value.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": repr(float(value))}
        case list():
            return [to_json(what, item) for item in value]
        case tuple():
            return {"$tuple": [to_json(what, item) for item in value]}
        case dict() if all(isinstance(key, str) and key[:1] != "$" for key in value):
            return {key: to_json(what, item) for key, item in value.items()}
        case dict():
            return {"$dict": [[to_json(what, item) for item in pair] for pair in value.items()]}
    raise CheckpointError(
        f"`{what}` must consist of numbers, strings, booleans, None, lists, tuples and dicts, but "
        f"has a {type(value).__name__}. Write another format, or save it without."
    )


def from_json(what: str, value: Any) -> Any:
    """Decodes the output of :func:`to_json`.

    :raises CheckpointError: ``value`` is no such output.
    """
    match value:
        case float() if not math.isfinite(value):
            raise damaged(what, "of finite numbers", value)
        case list():
            return [from_json(what, item) for item in value]
        case dict() if any(key[:1] == "$" for key in value):
            return _tagged(what, value)
        case dict():
            return {key: from_json(what, item) for key, item in value.items()}
    return value


def _tagged(what: str, value: dict[str, Any]) -> Any:
    match list(value.items()):
        case [("$float", "nan" | "inf" | "-inf" as text)]:
            return float(text)
        case [("$tuple", list(items))]:
            return tuple(from_json(what, item) for item in items)
        case [("$dict", list(pairs))] if all(type(p) is list and len(p) == 2 for p in pairs):
            try:
                decoded = {from_json(what, key): from_json(what, item) for key, item in pairs}
            except TypeError:  # A key that is a list or dict.
                decoded = {}
            if len(decoded) == len(pairs):
                return decoded
    raise damaged(what, "a float, a tuple or a dict, by its key with `$`", value)


def damaged(what: str, must: str, value: Any) -> CheckpointError:
    """Returns the error for a file whose ``what`` is ``value``."""
    shown = str(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return CheckpointError(
        f"{what[0].upper()}{what[1:]} must be {must}, but is {shown} instead. The checkpoint is "
        "damaged: copy it again."
    )
