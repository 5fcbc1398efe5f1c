"""Finds the private names of a library in source files."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def names_of(tree: ast.Module, library: str) -> set[str]:
    """Returns the dotted names of ``library`` that a file imports, or reads as their attributes."""
    known: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                known[alias.asname or name] = name
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if name := _dotted(node, known):
            found.add(name)
    return {name for name in found if name.partition(".")[0] == library}


def _dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, known)):
        return f"{owner}.{node.attr}"
    return None


def attributes(tree: ast.Module, is_of_library: Callable[[str], bool]) -> Iterator[str]:
    """Returns attributes of objects other than ``self``, and methods of classes, with names of a
    library. For attributes of modules, see :func:`names_of`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_of_library(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and is_of_library(item.name):
                    yield item.name


def exists(name: str) -> bool:
    """Returns whether a dotted name exists."""
    path, *parts = name.split(".")
    found = import_module(path)
    for part in parts:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part) if hasattr(found, part) else import_module(path)
        except ImportError:
            return False
    return True


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def constant(tree: ast.Module, name: str) -> Any:
    """Returns the value that a module assigns to ``name``, without importing it."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"There is no `{name}`.")


def check_bounds(package: str, parts: int) -> None:
    """Checks that ``pyproject.toml`` allows the version of ``constraints.txt``, and others only if
    their first numbers are the same."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    tested = Version(pins[package])
    last = tested.release[:parts]
    next_one = ".".join(map(str, (*last[:-1], last[-1] + 1)))
    found = [r for r in map(Requirement, asked) if r.name == package]
    assert found
    for requirement in found:
        assert tested in requirement.specifier
        assert next_one not in requirement.specifier, f"{requirement}, but tested is {tested}"
