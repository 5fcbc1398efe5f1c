"""Hydra configs; installed as ``tp_embed.configs``, found through ``pkg://tp_embed.configs``."""
