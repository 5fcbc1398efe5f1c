"""Writes benchmark results into pages of the documentation."""

from __future__ import annotations

from pathlib import Path


def insert(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces the text between the marks in ``page``.

    :raises ValueError: ``page`` lacks the marks.
    """
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{page} must have the marks {begin!r} and {end!r}, but has not.")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
