"""Findings of the doctor, and their output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, log10
from statistics import median
from typing import Any, Literal, TypeVar

Level = Literal["ok", "note", "warning", "error"]

_OUTLIER = 3.0  # Times the median of the others.

_Key = TypeVar("_Key")

LEVELS: Sequence[Level] = ("ok", "note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    :param topic: a word, such as "versions".
    :param what: the result, as a sentence without a period.
    :param ranks: the ranks it concerns.
    :param fix: what to do about it.
    """

    level: Level
    topic: str
    what: str
    ranks: tuple[int, ...]
    fix: str = ""


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """Merges findings that differ only in their ranks, in the order of the first."""
    folded: dict[Finding, set[int]] = {}
    for finding in findings:
        folded.setdefault(replace(finding, ranks=()), set()).update(finding.ranks)
    return [replace(key, ranks=tuple(sorted(ranks))) for key, ranks in folded.items()]


def name_ranks(ranks: Iterable[int]) -> str:
    """Formats ranks for humans.

    >>> name_ranks([0, 1, 2, 5])
    'ranks 0-2, 5'
    >>> name_ranks([3])
    'rank 3'
    """
    order = sorted(set(ranks))
    starts = [rank for rank in order if rank - 1 not in order]
    ends = [rank for rank in order if rank + 1 not in order]
    runs = [f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True)]
    return f"rank{'s' if len(order) > 1 else ''} {', '.join(runs)}"


def differing(values: Mapping[int, str]) -> str:
    """Lists the ranks with each value.

    >>> differing({0: "a", 1: "a", 2: "b"})
    'a on ranks 0-1, b on rank 2'
    """
    by_value: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        by_value.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in by_value.items())


def odd_ones(values: Mapping[int, str]) -> tuple[int, ...]:
    """Returns the ranks outside the majority; in a tie, rank 0 counts as the majority."""
    counts = list(values.values())
    usual = max(dict.fromkeys(counts), key=counts.count)
    return tuple(sorted(rank for rank, value in values.items() if value != usual))


def outliers(seconds: Mapping[_Key, float]) -> Iterator[tuple[_Key, float]]:
    """Yields the keys that take much longer than others, with the median of the others.

    >>> list(outliers({"a": 1.0, "b": 9.0, "c": 1.2}))
    [('b', 1.1)]
    """
    for key, each in seconds.items():
        others = [other for name, other in seconds.items() if name != key]
        if others and each > _OUTLIER * median(others):
            yield key, median(others)


def spread(values: Sequence[float]) -> str:
    """Formats the median and the range of ``values``.

    >>> spread([1.5, 120.4, 3.0])
    '3.00 (1.50-120)'
    """
    middle, low, high = median(values), min(values), max(values)
    return f"{_three_digits(middle)} ({_three_digits(low)}-{_three_digits(high)})"


def as_lines(findings: Sequence[Finding], nodes: Mapping[int, str]) -> list[str]:
    """Returns a line per finding, and a line that counts them.

    :param nodes: the name of the node of each rank, if known.
    """
    lines = []
    for finding in findings:
        where = _where(finding.ranks, nodes) if len(nodes) > 1 else ""
        fix = f" Fix: {finding.fix}" if finding.fix else ""
        lines.append(f"{finding.level:7}  {finding.topic:10}  {finding.what}{where}.{fix}")
    counts = [
        f"{n} {level}{'s' if n != 1 else ''}"
        for level in reversed(LEVELS[1:])
        if (n := sum(finding.level == level for finding in findings))
    ]
    return [*lines, ", ".join(counts) or "no problems found"]


def as_data(finding: Finding, nodes: Mapping[int, str]) -> dict[str, Any]:
    """Converts a finding to JSON values."""
    return {
        "level": finding.level,
        "topic": finding.topic,
        "what": finding.what,
        "ranks": list(finding.ranks),
        "nodes": sorted({nodes[rank] for rank in finding.ranks if rank in nodes}),
        "fix": finding.fix,
    }


def _where(ranks: Sequence[int], nodes: Mapping[int, str]) -> str:
    if not ranks:
        return ""
    if set(ranks) == set(nodes):
        return " [all ranks]"
    on = sorted({nodes[rank] for rank in ranks if rank in nodes})
    if len(set(nodes.values())) == 1:
        on = []
    elif len(on) > 4:
        on = [*on[:3], f"{len(on) - 3} more"]
    return f" [{name_ranks(ranks)}{' on ' if on else ''}{', '.join(on)}]"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, min(3, 2 - floor(log10(value))))}f}" if value > 0 else "0"
