"""``tp-embed report`` writes an HTML page about a run."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tp_embed.command import Command, Report


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="the directory of the run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="by default DIRECTORY/report.html"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _run(values: Mapping[str, Any]) -> Report:
    from .report import write_report  # Keeps other commands fast to import.

    path = write_report(values["directory"], values["output"])
    return Report({"report": str(path)}, [str(path)])


REPORT = Command(
    "report",
    "write a page about a run",
    "Writes a page about a run from the monitor.jsonl or metrics.csv in its directory.",
    _add_arguments,
    _run,
    "docs/monitoring.md explains how to write them.",
)
