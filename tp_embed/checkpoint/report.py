"""Formats the reports of the commands as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Described = Mapping[str, Any]


def size(nbytes: float) -> str:
    """Formats a number of bytes for people."""
    if nbytes < 1024:
        return f"{nbytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Formats rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def inspection(described: Described, show_all: bool) -> list[str]:
    """Formats the result of :func:`~tp_embed.checkpoint.inspect.describe`."""
    tensors = described["tensors"]
    optimizer = described["optimizer"]
    facts = [
        ("format", described["format"]),
        ("path", described["path"]),
        ("step", "unknown" if described["step"] is None else str(described["step"])),
        ("TP size", str(described["tp_size"])),
        ("size", f"{size(described['bytes'])} in {len(tensors)} Parameters and buffers"),
    ]
    if optimizer is not None:
        facts.append(("optimizer", f"{optimizer['param_groups']} param groups"))
    if described["extra"]:
        facts.append(("also", ", ".join(described["extra"])))
    lines = columns(facts)
    lines += tensor_lines(tensors, show_all)
    if described["ties"]:
        ties = described["ties"].items()
        lines += ["ties", *columns([(alias, "is", name) for alias, name in ties], "  ")]
    if described["notes"]:
        lines += ["notes", *(f"  {note}" for note in described["notes"])]
    return lines


def conversion(described: Described, show_all: bool) -> list[str]:
    """Formats the report of the command ``convert``."""
    tensors, output = described["tensors"], described["output"]
    ranks = f" for {described['tp_size']} ranks" if described["tp_size"] > 1 else ""
    what = (
        f"{size(described['bytes'])} in {len(tensors)} Parameters and buffers, from "
        f"{described['source_format']} to {described['format']}{ranks}"
    )
    if described["dry_run"]:
        return [f"would write `{output}`: {what}", *tensor_lines(tensors, show_all)]
    seconds = described["seconds"]
    verified = "; read back, and the same" if described["verified"] else ""
    return [f"wrote `{output}`: {what}, in {seconds:.1f} s{verified}"]


def tensor_lines(tensors: Sequence[Described], show_all: bool) -> list[str]:
    """Lists the tables, and the other tensors one by one or as one line."""
    tables = [each for each in tensors if each["kind"] == "table"]
    others = [each for each in tensors if each["kind"] != "table"]
    lines = _section("tables", tables) if tables else ["tables: none has a usual name"]
    if others and show_all:
        lines += _section("others", others)
    elif others:
        nbytes = size(sum(each["bytes"] for each in others))
        lines.append(f"others: {len(others)}, {nbytes}; `--all` lists them")
    return lines


def _section(title: str, tensors: Sequence[Described]) -> list[str]:
    header = ("name", "shape", "dtype", "cut", "states")
    rows = [
        (
            each["name"],
            " x ".join(map(str, each["shape"])) or "scalar",
            each["dtype"],
            _cut(each),
            ", ".join(f"{state} {dtype}" for state, dtype in each["states"].items()),
        )
        for each in tensors
    ]
    return [title, *columns([header, *rows], "  ")]


def _cut(tensor: Described) -> str:
    if tensor["layout"] != "sharded":
        return str(tensor["layout"])
    dim, ranges = tensor["cut"]["dim"], tensor["cut"]["ranges"]
    blocks = f", {len(ranges[0])} blocks" if len(ranges[0]) > 1 else ""
    return f"dim {dim} / {len(ranges)}{blocks}"
