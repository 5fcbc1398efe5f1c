"""The fenced blocks of README.md and the pages of docs/.

A block of Python runs on two ranks and a block of shell commands is checked, unless a word after
its language says otherwise: `no-run`, or `lines-of=FILE` for lines that a script of this repository
has in the same order. Blocks of docs/tutorials run as a reader would run them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from launch import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = ROOT / "docs" / "tutorials"

_FENCE = re.compile(r"^( *)```(?P<info>\S[^\n`]*)\n(?P<text>.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split()
        line = text.count("\n", 0, match.start("text"))
        yield Block(page, line, language, tuple(marks), dedent(match["text"]))


def blocks(language: str) -> list[Block]:
    return [b for page in PAGES for b in blocks_of(page) if b.language == language]


def python_blocks() -> list[Block]:
    """Those that run on two ranks."""
    return [b for b in blocks("python") if not b.marks and b.page.parent != TUTORIALS]
