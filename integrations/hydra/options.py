"""Converts the choices of a config to the arguments of :func:`tp_embed.shard_embeddings`."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


def shard_options(config: DictConfig) -> dict[str, Any]:
    """Returns the keyword arguments of :func:`tp_embed.shard_embeddings`.

    :param config: holds the choices of the groups ``embedding`` and, if chosen, ``head`` and
        ``init``. In a project with its own groups, pass ``config.tp_embed``.
    """
    from tp_embed.lookup.train_rows import read_rows  # Imports torch, which takes seconds.

    embedding, head = config.embedding, config.get("head")
    rows: Any = OmegaConf.to_container(embedding.train_rows)
    options = {
        "strategy": embedding.strategy.value,
        "rules": {pattern: strategy.value for pattern, strategy in embedding.rules.items()},
        "placement": embedding.placement.value,
        "output": embedding.output.value,
        "dedup": embedding.dedup.value,
        "sparse": embedding.sparse,
        "reuse_grad": embedding.reuse_grad,
        "check_ids": embedding.check_ids,
        "train_rows": {name: read_rows(chosen) for name, chosen in rows.items()},
        "init_fn": instantiate(embedding.init_fn),
    }
    if head is not None:
        options |= {"tie_head": head.tie_head, "shard_head": head.shard_head}
    return options


def table_options(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Returns the optimizers that tables have of their own: ``"tables"`` of the section
    ``"tp_embed"`` of a DeepSpeed config, which :func:`tp_embed.integrations.deepspeed.initialize`
    reads.

    :param config: as for :func:`shard_options`.
    """
    tables: Any = OmegaConf.to_container(config.embedding.tables, enum_to_str=True)
    return {
        name: {key: value for key, value in table.items() if value is not None}
        for name, table in tables.items()
    }
