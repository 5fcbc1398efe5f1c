"""Hydra: schemas and the search path for the configs in ``tp_embed.configs``, and tools for apps
that a launcher starts on several ranks."""

from .app import main, strip_local_rank
from .options import shard_options, table_options
from .registration import register_schemas

__all__ = ["main", "register_schemas", "shard_options", "strip_local_rank", "table_options"]
