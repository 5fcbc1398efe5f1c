"""What Sphinx does not see: public names without an entry, the picture of the layers, and links of
the files that are not pages. `make docs` checks the rest."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from inspect import isclass, isfunction

import pytest

from launch import ROOT

DOCS = ROOT / "docs"
PACKAGES = [
    "tp_embed",
    "tp_embed.checkpoint",
    "tp_embed.integrations.hydra",
    "tp_embed.integrations.deepspeed",
    "tp_embed.integrations.transformers",
    "tp_embed.monitor",
    "tp_embed.nn.init",
    "tp_embed.nn.loss",
    "tp_embed.nn.sequence",
    "tp_embed.nn.token_values",
    "tp_embed.optim",
    "tp_embed.plan",
    "tp_embed.watchdog",
]
REFERENCE = "".join(path.read_text() for path in (DOCS / "api").glob("*.rst"))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_in_the_reference(package):
    (directive,) = re.findall(
        rf"^\.\. (auto)?module:: {re.escape(package)}\n((?:   .*\n)*)", REFERENCE, re.MULTILINE
    )
    is_whole = directive[0] and ":no-members:" not in directive[1]
    if is_whole:
        return
    listed = set(re.findall(r"^\.\. auto\w+:: (\S+)", REFERENCE, re.MULTILINE))
    module = import_module(package)
    public = [n for n in module.__all__ if isclass(v := getattr(module, n)) or isfunction(v)]
    assert public
    assert set(public) <= listed


def test_picture_has_the_layers_of_the_contract_in_their_order():
    picture = (DOCS / "architecture.svg").read_text()
    heights = {name: int(y) for y, name in re.findall(r'y="(\d+)" [^>]*bold"[^>]*>(\w+)<', picture)}

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [name.removeprefix("tp_embed.") for layer in layers for name in layer.split(" | ")]
    # Parts of `plan` are several, and a private module is none of the layers that readers see.
    order = [heights[name] for name in names if not re.search(r"[.]|^_", name)]
    assert order == sorted(order)

    packages = {path.parent.name for path in (ROOT / "tp_embed").glob("*/__init__.py")}
    assert packages <= set(heights)


def slug(heading: str) -> str:
    """As GitHub makes an anchor."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md"])
def test_links(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
