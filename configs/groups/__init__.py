"""The groups that any project may choose from, as ``tp_embed/init: scaled``.

Hydra imports this package when it looks for configs in it. This registers the schemas for projects
that name it in ``hydra.searchpath``.
"""

from tp_embed.integrations.hydra.registration import register_group_schemas

register_group_schemas()
