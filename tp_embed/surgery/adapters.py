"""What integrations do for models of their packages, so that the core need not know them.

``tp_embed.integrations.NAME`` is about the package ``NAME``. If that is loaded, there may be models
of it: the module ``tp_embed.integrations.NAME.adapter`` is imported, if there is one, and adds what
it does to :data:`ADAPTERS`.
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
    """What a package of models wants to be done when their tables are sharded."""

    def check(self, model: Module, tables: Collection[Module]) -> None:
        """Called before ``tables``, embeddings and heads in ``model``, are sharded.

        :raises ValueError: something around them would not work on shards.
        """

    def adapt(self, model: Module) -> None:
        """Called when the tables of ``model`` are sharded. Doing it twice does no harm."""


ADAPTERS: list[Adapter] = []


def loaded_adapters() -> list[Adapter]:
    """:data:`ADAPTERS`, with those for all packages that are loaded by now."""
    # Not entry points: an old installation of a newer source would have none, without a word.
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
