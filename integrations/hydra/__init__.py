"""Hydra: schemas for the configs that are installed as ``tp_embed.configs``, and where they are."""

from .options import shard_options
from .registration import register_schemas

__all__ = ["register_schemas", "shard_options"]
