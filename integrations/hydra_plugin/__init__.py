"""``hydra_plugins.tp_embed``, where Hydra finds the plugin of an installed wheel."""

from tp_embed.integrations.hydra.registration import TpEmbedSearchPath

__all__ = ["TpEmbedSearchPath"]
