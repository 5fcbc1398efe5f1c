"""Watches training: what becomes of the tables, what ranks send each other, and a page about it.

:class:`.tables.Monitor` writes figures of the steps, with those of :class:`.traffic.Traffic`, into
:mod:`.run_log`, of which :mod:`.report` makes a page, without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import write_report
    from .tables import Monitor
    from .traffic import Traffic

__all__ = ["Monitor", "Traffic", "write_report"]

_MODULE_OF = {"Monitor": "tables", "Traffic": "traffic", "write_report": "report"}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
