"""Writes the reference of all groups and keys, ``docs/config.md``.

    python -m tp_embed.integrations.hydra.reference docs/config.md

Takes choices and values from the files in ``configs/``, types and meanings from the schemas.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from enum import Enum
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from .inits import INITS, Init
from .schema import DataConfig, EmbeddingConfig, HeadConfig, ModelConfig, TrainConfig

_HEADER = """\
# Configuration

Written by `python -m tp_embed.integrations.hydra.reference docs/config.md`; a test checks that it
is current.

`examples/train_lm.py` is a [Hydra](https://hydra.cc) app. Choose from a group with `GROUP=CHOICE`,
set a key with `KEY=VALUE`, and sweep over either with `--multirun` and `GROUP=A,B` or
`'init=glob(*)'`. Errors list the valid choices and values; after a misspelt key or a value of a
wrong type, the valid keys. Below, `as=B` stands for the values of choice `B`, except for those that
follow. [launching.md](launching.md) says how to start the app, on one node or several, and where
its ranks write.

"""

_IN_OTHER_PROJECTS = """\
## In other projects

`pip install 'tp-embed[hydra]'` gives any Hydra app the groups `tp_embed/init`, `tp_embed/embedding`
and `tp_embed/head`, with the choices below, and no other groups:

```yaml
defaults:
  - tp_embed/init: scaled
  - tp_embed/embedding: sharded
  - tp_embed/head: sharded
  - _self_

# Only for editable installs (`pip install -e`), where Hydra does not find plugins.
hydra:
  searchpath: [pkg://tp_embed.configs.groups]
```

Hydra ignores `hydra.searchpath` for `glob(*)` and completion. To get them with an editable install,
call `tp_embed.integrations.hydra.register_schemas()` before `hydra.main` runs instead.

```python
from tp_embed.integrations.hydra import shard_options

shard_embeddings(model, gang, **shard_options(config.tp_embed))
```

Optimizers of tables of their own (`embedding.tables`) and the strategy `world` need an engine by
`tp_embed.integrations.deepspeed.initialize()`, whose config has the section
`"tp_embed": {"strategy": "none", "tables": table_options(config.tp_embed)}`, and
`grad_reduction="mean"` in the call above, as in `examples/train_lm.py`. `table_options` is in the
same module.

Then `python app.py tp_embed/init=normal tp_embed.init.std=0.02` works. Add `tp_embed/ranks` to the
defaults list to give all ranks one run directory: see
[launching.md](launching.md#your-own-hydra-app). To add your own init function, write a file
`tp_embed/init/NAME.yaml` among your configs, with or without your own schema:

```yaml
_target_: my_package.my_function # called with the embedding, see `tp_embed.nn.init.blockwise`
_partial_: true
power: 2
```

For our own apps, write `init/NAME.yaml` in the directory that you pass as `--config-dir`.

"""

# The meaning of each group, its schema, and the package of its keys if not its name.
_GROUPS: dict[str, tuple[str, type | None, str | None]] = {
    "init": ("How to initialize tables: the functions of `tp_embed.nn.init`.", None, None),
    "embedding": ("How to shard tables.", EmbeddingConfig, None),
    "head": ("How to shard the output head.", HeadConfig, None),
    "model": (
        "The size of the model. A null key takes the default of transformers.",
        ModelConfig,
        None,
    ),
    "data": ("The text.", DataConfig, None),
    "deepspeed": ("The ZeRO stage. The keys are keys of the DeepSpeed config.", None, None),
    "optimizer": ("The optimizer, in the DeepSpeed config.", None, "deepspeed.optimizer"),
    "precision": ("The dtype of weights and activations.", None, "deepspeed"),
    "offload": ("What to offload from the device between uses.", None, "deepspeed"),
    "checkpoint": ("Which checkpoints `resume=true` reads.", None, "deepspeed.checkpoint"),
    "launcher": ("One run or a sweep, and their directories.", None, "hydra"),
    "experiment": ("Complete sets of choices.", None, ""),
    "debug": ("Runs that take seconds.", None, ""),
}
_SHARED = ("init", "embedding", "head")


def reference() -> str:
    """Returns the page, in Markdown."""
    defaults = _defaults()
    parts = [_HEADER, _IN_OTHER_PROJECTS]
    parts += [_group(name, *about, defaults[name]) for name, about in _GROUPS.items()]
    return "".join([*parts, _train_keys()]).rstrip("\n") + "\n"


def choices(group: str) -> dict[str, Traversable]:
    """Returns the files of a group by the names of their choices."""
    configs = files("tp_embed.configs")
    directory = configs / "groups" / "tp_embed" / group if group in _SHARED else configs / group
    found = [file for file in directory.iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file for file in sorted(found, key=lambda f: f.name)}


def _defaults() -> dict[str, str]:
    """Returns the choice of ``train.yaml`` in each group."""
    config = OmegaConf.load(str(files("tp_embed.configs") / "train.yaml"))
    return {
        group: choice
        for entry in config.defaults
        if isinstance(entry, DictConfig)
        for group, choice in entry.items()
        if isinstance(group, str) and not group.startswith("override ")
    }


def _group(name: str, about: str, schema: type | None, package: str | None, default: str) -> str:
    text = f"## `{name}`\n\n{about}"
    if package == "":
        text += " They set keys of the whole config."
    elif package is not None:
        text += f" The keys are in `{package}`."
    lines = []
    for choice, file in choices(name).items():
        keys = dict(_flat(OmegaConf.load(str(file))))
        shown = ", ".join(f"`{key}={_text(value)}`" for key, value in keys.items())
        mark = " (default)" if choice == default else ""
        lines.append((f"`{choice}`{mark}", _comment(file), shown))
    text += "\n\n" + _table(("choice", "", "values"), lines)
    if name == "init":
        lines = [
            (f"`init.{key}`", kind, ", ".join(f"`{function}`" for function in functions))
            for (key, kind), functions in _init_parameters().items()
        ]
        text += "\n" + _table(("key", "type", "functions"), lines)
    elif schema is not None:
        text += "\n" + _keys(schema, f"{name}.")
    return text + "\n"


def _train_keys() -> str:
    config = OmegaConf.load(str(files("tp_embed.configs") / "train.yaml"))
    return "## Keys of a run\n\n" + _keys(TrainConfig, "", config)


def _keys(schema: type, prefix: str, values: Any = None) -> str:
    lines, types = [], _types(schema)
    for field in fields(schema):
        if meaning := field.metadata.get("meaning"):
            line = [f"`{prefix}{field.name}`", types[field.name], meaning]
            if values is not None:
                line.insert(2, f"`{_text(values[field.name])}`")
            lines.append(line)
    header = ["key", "type", "meaning"]
    if values is not None:
        header.insert(2, "default")
    return _table(header, lines)


def _init_parameters() -> dict[tuple[str, str], list[str]]:
    """Maps each parameter, by name and type, to the functions that have it."""
    found: dict[tuple[str, str], list[str]] = {}
    common = {field.name for field in fields(Init)}
    for function, schema in INITS.items():
        for key, kind in _types(schema).items():
            if key not in common:
                found.setdefault((key, kind), []).append(function)
    return found


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys and values of a file, except keys for Hydra."""
    for key in config:
        value = config._get_node(key)
        if not prefix and key in ("defaults", "_target_", "_partial_"):
            if key == "defaults":
                yield from _chosen(value)
        elif isinstance(value, DictConfig) and len(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chosen(defaults: Any) -> Iterator[tuple[str, Any]]:
    for entry in defaults:
        if isinstance(entry, DictConfig):
            for key, value in entry.items():
                yield str(key).removeprefix("override /"), value
        elif not entry.startswith(("/", "_")):
            yield "as", entry


def _comment(file: Traversable) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#") and "@package" not in line]
    return comments[0].removeprefix("#").strip()


def _text(value: Any) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    elif hasattr(value, "_value"):
        value = value._value()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _types(schema: type) -> dict[str, str]:
    """Returns the type of each key, or its choices if it is an enum."""

    def text(hint: Any) -> str:
        if isinstance(hint, type) and issubclass(hint, Enum):
            return ", ".join(f"`{choice.name}`" for choice in hint)
        name = hint.__name__ if type(hint) is type else str(hint)
        return f"`{re.sub(r'[a-z_.]+[.]', '', name)}`".replace("|", "\\|")

    return {key: text(hint) for key, hint in get_type_hints(schema).items()}


def _table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = list(header)
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
