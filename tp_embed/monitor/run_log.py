"""Writes and reads the log of a run.

`monitor.jsonl` has a line of JSON for each start of the run, ``{"run": {...}}``, and one for each
sampled step. It is append-only: when a run resumes from an earlier step, its rows supersede the old
rows after that step on reading.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_NAME = "monitor.jsonl"
METRICS_NAME = "metrics.csv"


class RunLog:
    """Appends to the log of the run in ``directory``, which is created if needed."""

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / LOG_NAME

    def start(self, run: Mapping[str, Any]) -> None:
        """Appends an entry for the start of a run."""
        self._append({"run": run})

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row. ``"step"`` is the number of steps done, ``"every"`` the number of steps
        that the row represents."""
        self._append(_finite(row))

    def _append(self, entry: Mapping[str, Any]) -> None:
        # Reopened for each row, so that the log is complete whenever the process ends.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, default=str) + "\n")


def _finite(value: Any) -> Any:
    """Replaces infinities and NaN, which JSON lacks, by ``None``."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Run:
    """A run as read from its directory: ``about`` describes its last start, ``rows`` are sampled
    steps, ``metrics`` are the columns of a `metrics.csv` with a column ``step``."""

    name: str
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def series(self, *keys: str) -> tuple[list[float], list[float]]:
        """Returns the steps with a number at ``row[key][key]...``, and these numbers."""
        points = [(row["step"], _dig(row, keys)) for row in self.rows]
        found = [(step, value) for step, value in points if isinstance(value, int | float)]
        return [step for step, _ in found], [float(value) for _, value in found]

    def names(self, key: str) -> list[str]:
        """Returns each ``name`` of ``row[key][name]``, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.get(key) or {}))


def read_run(directory: Path | str) -> Run:
    """Reads `monitor.jsonl` and `metrics.csv` in the directory of a run.

    :raises FileNotFoundError: the directory has neither.
    """
    directory = Path(directory)
    run = Run(directory.resolve().name)
    log, metrics = directory / LOG_NAME, directory / METRICS_NAME
    if not log.exists() and not metrics.exists():
        raise FileNotFoundError(
            f"`directory` must have a `{LOG_NAME}` (written by a `Monitor` with `directory`) or a "
            f"`{METRICS_NAME}`, but '{directory}' has neither."
        )
    if log.exists():
        for entry in _entries(log):
            if "run" in entry:
                run.about = entry["run"]
                continue
            first = entry["step"] - entry.get("every", 1)
            while run.rows and run.rows[-1]["step"] > first:
                run.rows.pop()
            run.rows.append(entry)
    if metrics.exists():
        run.metrics = _columns(metrics)
    return run


def _entries(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # Truncated when the process was killed.


def _columns(path: Path) -> dict[str, list[float]]:
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    if not table or "step" not in table[0]:
        return {}
    try:
        return {key: [float(row[key] or math.nan) for row in table] for key in table[0]}
    except (TypeError, ValueError):
        return {}  # Not numeric, so there is nothing to draw.


def _dig(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
