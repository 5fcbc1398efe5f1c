"""Hydra: schemas for the configs that are installed as ``tp_embed.configs``."""

from .schema import register_schemas

__all__ = ["register_schemas"]
