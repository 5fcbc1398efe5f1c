"""Registers our configs and their schemas with Hydra."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from .inits import INITS
from .ranks import register_resolvers
from .schema import AdamConfig, EmbeddingConfig, HeadConfig, SGDConfig, TrainConfig

_CONFIGS = "pkg://tp_embed.configs"
_GROUPS = f"{_CONFIGS}.groups"
_SCHEMAS = "tp_embed/schema"


class TpEmbedSearchPath(SearchPathPlugin):
    """Gives every project the groups ``tp_embed/init``, ``tp_embed/embedding`` and
    ``tp_embed/head``, after its own configs, and nothing else of ours. Our own apps also get them
    by their short names.

    Does not use ``hydra.searchpath``, which Hydra ignores for ``glob(*)`` and completion.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        register_group_schemas()
        is_ours = any(element.path == _CONFIGS for element in search_path.get_path())
        search_path.append(provider="tp_embed", path=_GROUPS)
        if is_ours:
            search_path.append(provider="tp_embed", path=f"{_GROUPS}.tp_embed")


def register_group_schemas() -> None:
    """Registers the schemas and resolvers for the groups ``init``, ``embedding`` and ``head``, and
    for ``ranks``."""
    register_resolvers()
    store = ConfigStore.instance()
    for name, schema in INITS.items():
        store.store(group=f"{_SCHEMAS}/init", name=name, node=schema, provider="tp_embed")
    for name, node in {"embedding": EmbeddingConfig, "head": HeadConfig}.items():
        store.store(group=_SCHEMAS, name=name, node=node, provider="tp_embed")


def register_schemas() -> None:
    """Registers our schemas and groups with Hydra; call it before ``hydra.main`` or ``compose``
    runs. Required if the primary config is one of ours."""
    register_group_schemas()
    store = ConfigStore.instance()
    for name, node in {"adam": AdamConfig, "sgd": SGDConfig}.items():
        store.store(group=f"{_SCHEMAS}/optimizer", name=name, node=node, provider="tp_embed")
    store.store(name="tp_embed_train", node=TrainConfig, provider="tp_embed")
    Plugins.instance().register(TpEmbedSearchPath)  # Editable installs do not find plugins.
