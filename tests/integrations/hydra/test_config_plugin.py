"""A third-party project, with configs of its own and some of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import ROOT, run

APP = """
import hydra
import torch
from hydra.core.hydra_config import HydraConfig

from tp_embed import FakeGang, StandardEmbedding, shard_embeddings
from tp_embed.integrations.hydra import shard_options


def power(embed, *, exponent):
    with torch.no_grad():
        embed.weight.copy_(torch.arange(embed.weight.numel()).view_as(embed.weight) ** exponent)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config):
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2))
    torch.manual_seed(0)
    shard_embeddings(model, FakeGang(torch.device("cpu")), **shard_options(config.tp_embed))
    print("TARGET", config.tp_embed.init._target_)
    print("STRATEGY", config.tp_embed.embedding.strategy.value)
    print("OWN", config.model.layers, config.init.steps)
    print("TABLE", model[0].weight.flatten().tolist())


if __name__ == "__main__":
    main()
"""

PRIMARY = """
defaults:
  - model: small
  - init: warm
  - tp_embed/init: scaled
  - tp_embed/embedding: sharded
  - tp_embed/head: tied
  - tp_embed/ranks
  - _self_
"""

EDITABLE = """
hydra:
  searchpath: [pkg://tp_embed.configs.groups]
"""

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "toy"
version = "1.0"
dependencies = ["tp-embed[hydra]"]
[tool.setuptools]
packages = ["toy"]
[tool.setuptools.package-data]
toy = ["conf/**/*.yaml"]
"""


def write_project(root, primary=PRIMARY):
    files = {
        "pyproject.toml": PROJECT,
        "toy/__init__.py": "",
        "toy/app.py": APP,
        "toy/conf/config.yaml": primary,
        "toy/conf/model/small.yaml": "layers: 2\n",
        "toy/conf/init/warm.yaml": "steps: 7\n",
        "toy/conf/tp_embed/init/power.yaml": (
            "_target_: toy.app.power\n_partial_: true\nexponent: 2\n"
        ),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def build(source, out):
    # Without isolation, it uses the installed setuptools and no registry.
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)], source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")  # A copy, since setuptools leaves a `build/` behind.
    for room in ("tp_embed", "integrations", "configs"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a new environment with both wheels. It borrows their dependencies, but not
    the editable install of the package, which is only on the path of a `.pth` file."""
    environment = tmp_path_factory.mktemp("environment")
    toy = build(write_project(tmp_path_factory.mktemp("toy")), tmp_path_factory.mktemp("toy_wheel"))
    run([sys.executable, "-m", "venv", str(environment)])
    python = environment / "bin" / "python"
    run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel), str(toy)])
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


@pytest.fixture
def app(python, tmp_path):
    """Runs the app of the toy project, in a directory outside this tree."""

    def call(*overrides, fails=False):
        command = [str(python), "-m", "toy.app", *overrides]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return call


def says(output):
    return dict(re.findall(r"^([A-Z]+) (.*)$", output, re.MULTILINE))


def test_project_has_our_groups_by_our_name_and_its_own_by_theirs(app, python, tmp_path):
    where = [str(python), "-c", "import tp_embed; print(tp_embed.__file__)"]
    assert str(python.parent.parent) in subprocess.check_output(where, text=True, cwd="/")

    default = says(app())
    assert default["TARGET"] == "tp_embed.nn.init.scaled"
    assert default["STRATEGY"] == "embed"
    assert default["OWN"] == "2 7"
    (run_dir,) = (tmp_path / "outputs").glob("*/*")
    assert {path.name for path in run_dir.iterdir()} == {".hydra", "config.yaml", "logs"}
    assert (run_dir / "logs" / "rank-00000.log").exists()

    chosen = says(app("tp_embed/init=xavier_uniform", "tp_embed/embedding=vocab_sharded"))
    assert chosen["TARGET"] == "tp_embed.nn.init.xavier_uniform"
    assert chosen["STRATEGY"] == "vocab"
    assert chosen["TABLE"] != default["TABLE"]
    assert chosen["OWN"] == "2 7"


def test_options_reach_the_table_and_wrong_ones_are_named(app):
    constant = says(app("tp_embed/init=constant", "tp_embed.init.value=3"))
    assert constant["TABLE"] == str([3.0] * 8)
    error = app("tp_embed/init=normal", "tp_embed.init.std=abc", fails=True)
    assert "could not be converted to Float" in error
    error = app("tp_embed.embedding.strategy=rows", fails=True)
    assert "expected one of [auto, embed, vocab, world, none]" in error
    error = app("tp_embed/init=xavier", fails=True)
    assert "xavier_uniform" in error
    assert "power" in error


def test_project_has_init_functions_of_its_own(app):
    chosen = says(app("tp_embed/init=power", "tp_embed.init.exponent=3"))
    assert chosen["TARGET"] == "toy.app.power"
    assert chosen["TABLE"] == str([float(i**3) for i in range(8)])
    chosen = says(app("tp_embed.init._target_=tp_embed.nn.init.zeros"))
    assert chosen["TABLE"] == str([0.0] * 8)


def test_sweep_goes_over_ours_and_theirs(app):
    overrides = ["tp_embed/init=glob(*,exclude=from_tensor)", "hydra.sweep.dir=sweep"]
    output = app("--multirun", *overrides)
    targets = re.findall(r"^TARGET (.*)$", output, re.MULTILINE)
    ours = sorted(p.stem for p in (ROOT / "configs/groups/tp_embed/init").glob("*.yaml"))
    expected = {f"tp_embed.nn.init.{name}" for name in ours if name != "from_tensor"}
    assert {*targets} == expected | {"toy.app.power"}


def test_nothing_else_of_ours_is_on_its_search_path(app):
    paths = app("--info", "searchpath")
    assert "pkg://tp_embed.configs.groups " in paths
    assert paths.count("tp_embed.configs") == 1
    groups = app("--help").split("== Configuration groups ==")[1].split("== Config ==")[0]
    found = dict(re.findall(r"^([a-z_/]+): (.*)$", groups, re.MULTILINE))
    assert found["init"] == "warm"
    assert found["model"] == "small"
    ours = {name for name in found if not name.startswith("hydra")} - {"init", "model"}
    schemas = {name for name in ours if name.startswith("tp_embed/schema")}
    # And `tp_embed`, which has `ranks`.
    assert ours - schemas == {"tp_embed", "tp_embed/embedding", "tp_embed/head", "tp_embed/init"}


def test_editable_install_needs_one_line_in_the_config_or_the_code(tmp_path):
    """The tests run in an editable install, where Hydra finds no plugins."""
    project = write_project(tmp_path, PRIMARY + EDITABLE)
    command = [sys.executable, "-m", "toy.app", "tp_embed/init=xavier_uniform"]
    output = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    assert says(output)["TARGET"] == "tp_embed.nn.init.xavier_uniform"
    assert says(output)["OWN"] == "2 7"

    (project / "toy" / "conf" / "config.yaml").write_text(PRIMARY)
    start = "from tp_embed.integrations.hydra import register_schemas as r; r()\n"
    (project / "toy" / "app.py").write_text(start + APP)
    command[-1:] = ["--multirun", "tp_embed/init=glob(xavier*)"]
    output = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^TARGET (.*)$", output, re.MULTILINE)
    assert targets == ["tp_embed.nn.init.xavier_normal", "tp_embed.nn.init.xavier_uniform"]
    assert EDITABLE.strip() in (ROOT / "docs" / "config.md").read_text(encoding="utf-8")


def test_own_apps_keep_short_names_in_a_wheel(python, tmp_path):
    script = """
import hydra
from tp_embed.integrations.hydra import register_schemas
register_schemas()
with hydra.initialize_config_module("tp_embed.configs", version_base="1.3"):
    config = hydra.compose("train", ["init=normal", "init.std=0.5", "head=tied"])
print(config.init.std, config.head.shard_head)
"""
    command = [str(python), "-c", script]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["0.5", "False"]


def test_wheel_has_the_plugin_and_no_package_that_others_share(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    plugin = [name for name in names if name.startswith("hydra_plugins/")]
    assert plugin == ["hydra_plugins/tp_embed/__init__.py"]  # A namespace has no `__init__.py`.
    assert "tp_embed/configs/groups/tp_embed/init/scaled.yaml" in names


def test_every_shared_file_is_independent_of_where_it_is():
    """Files refer to schemas by absolute names, and to each other by relative names."""
    for path in Path(ROOT / "configs" / "groups").glob("tp_embed/*/*.yaml"):
        schema, own = OmegaConf.load(path).defaults
        assert schema.startswith("/tp_embed/schema/")
        assert schema.endswith("@_here_")
        assert own == "_self_"
        assert "${init}" not in path.read_text()
