"""Lets integrations adapt models of other packages, so that the core need not know them.

``tp_embed.integrations.NAME`` integrates the package ``NAME``. If that package is loaded,
``tp_embed.integrations.NAME.adapter`` is imported, if it exists, and adds itself to
:data:`ADAPTERS`.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch.nn import Module


class Adapter(Protocol):
    """Checks and adapts models of one package when their tables are sharded."""

    def check(self, model: Module, tables: Collection[Module]) -> None:
        """Runs before ``tables``, embeddings and heads of ``model``, are sharded.

        :raises ValueError: code around the tables would not work on shards.
        """

    def adapt(self, model: Module) -> None:
        """Runs after the tables of ``model`` are sharded. Must be idempotent."""


ADAPTERS: list[Adapter] = []


def loaded_adapters() -> list[Adapter]:
    """Returns :data:`ADAPTERS`, after importing the adapters of all loaded packages."""
    # Not entry points: an old installation of a newer source would silently lack them.
    try:
        integrations = import_module("tp_embed.integrations")
    except ModuleNotFoundError as e:
        raise ImportError(
            "`tp_embed` must be installed with its integrations, which adapt models of other "
            "packages, but they are missing. In a source tree, run `pip install -e .`."
        ) from e
    for package in pkgutil.iter_modules(integrations.__path__):
        if package.name in sys.modules:
            folders = [str(Path(folder, package.name)) for folder in integrations.__path__]
            if any(module.name == "adapter" for module in pkgutil.iter_modules(folders)):
                import_module(f"{integrations.__name__}.{package.name}.adapter")
    return ADAPTERS
