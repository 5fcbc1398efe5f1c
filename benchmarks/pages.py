"""Pages of the documentation that hold what a benchmark has found."""

from __future__ import annotations

from pathlib import Path


def insert(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what ``page`` has between the marks.

    :raises ValueError: ``page`` does not have them.
    """
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{page} must have the marks {begin!r} and {end!r}, but has not.")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
