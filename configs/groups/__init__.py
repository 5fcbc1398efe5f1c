"""The groups that any project may choose from, as ``tp_embed/init: scaled``.

Hydra imports this package when it looks for configs in it, so their schemas are known where
``hydra.searchpath`` names it, too.
"""

from tp_embed.integrations.hydra.registration import register_group_schemas

register_group_schemas()
