"""Monitors training: statistics of the tables, traffic between ranks, and a report.

:class:`.tables.Monitor` logs metrics of sampled steps, including :class:`.traffic.Traffic`, to
:mod:`.run_log`. :mod:`.report` renders the log as a page, without torch.
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
