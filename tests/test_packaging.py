"""The wheel, built from the tree and installed in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from launch import ROOT, run

ROOMS = {
    "tp_embed": "tp_embed",
    "integrations": "tp_embed/integrations",
    "configs": "tp_embed/configs",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # A copy, since setuptools leaves a `build/` behind.
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Without isolation, it uses the installed setuptools and no registry.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    run(build, cwd=source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel, and nothing else, installed."""
    environment = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", str(environment)])
    python = environment / "bin" / "python"
    run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)])
    return python


def test_wheel_holds_the_tree_and_nothing_else(wheel):
    expected = set()
    for room, installed in ROOMS.items():
        for path in (ROOT / room).rglob("*"):
            if path.suffix in {".py", ".yaml"} or path.name == "py.typed":
                expected.add(f"{installed}/{path.relative_to(ROOT / room)}")
    expected.remove("tp_embed/integrations/hydra_plugin/__init__.py")
    expected.add("hydra_plugins/tp_embed/__init__.py")  # Where Hydra looks for plugins.
    assert any(name.endswith(".yaml") for name in expected)

    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_package_has_one_top_level_name_of_its_own_and_is_lazy(python):
    script = f"""
import importlib.util, sys
from importlib.resources import files
import tp_embed
assert "torch" not in sys.modules
assert importlib.util.find_spec("integrations") is None
assert importlib.util.find_spec("configs") is None
assert importlib.util.find_spec("tp_embed.integrations.deepspeed") is not None
assert "shard_embeddings" in dir(tp_embed)
assert tp_embed.__version__ == {version()!r}
assert "torch" not in sys.modules
print(*sorted(p.name for p in (files("tp_embed.configs") / "groups/tp_embed/init").iterdir()))
"""
    output = subprocess.run(
        [str(python), "-c", script], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == sorted(
        p.name for p in (ROOT / "configs/groups/tp_embed/init").glob("*.yaml")
    )


def test_editable_install_is_lazy_and_has_the_same_names():
    script = """
import sys, tp_embed
assert "torch" not in sys.modules
from importlib.resources import files
import tp_embed.integrations
print((files("tp_embed.configs") / "train.yaml").is_file(), tp_embed.__file__)
"""
    output = subprocess.run(
        [sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    found, path = output.split()
    assert found == "True"
    assert Path(path) == ROOT / "tp_embed" / "__init__.py"


def test_every_public_name_can_be_imported():
    import tp_embed

    for name in tp_embed.__all__:
        assert getattr(tp_embed, name).__name__ == name
    assert set(tp_embed.__all__) == set(tp_embed._MODULE_OF)
    with pytest.raises(AttributeError, match="has no attribute 'Embeding'"):
        tp_embed.Embeding  # noqa: B018 (looking it up is the test)


def version():
    """Returns the version in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_version_is_the_one_of_the_project_and_needs_no_torch(tmp_path):
    script = """
import sys, tp_embed
print(tp_embed.__version__, dir(tp_embed) == sorted([*tp_embed.__all__, "__version__"]))
assert not any(name in sys.modules for name in ("torch", "safetensors"))
"""
    # Without site-packages (-S), only the source is importable, and no package is installed.
    (tmp_path / "tp_embed").symlink_to(ROOT / "tp_embed")
    for flags, shown in (([], version()), (["-S"], "0+unknown")):
        command = [sys.executable, *flags, "-c", script]
        output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert output.stdout.split() == [shown, "True"]


def test_dir_lists_public_names_only():
    import tp_embed

    tp_embed.shard_embeddings  # noqa: B018 (importing modules must not add their names)
    assert dir(tp_embed) == sorted([*tp_embed.__all__, "__version__"])
