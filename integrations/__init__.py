"""Integrations with DeepSpeed, Hydra and other frameworks, as ``tp_embed.integrations``."""
