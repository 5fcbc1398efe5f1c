"""Sharded tables for Accelerate."""

from __future__ import annotations

from typing import Any, Literal

from accelerate.utils import DummyOptim
from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.integrations.deepspeed.config import read_section
from tp_embed.integrations.deepspeed.full_values import guard_full_values
from tp_embed.integrations.deepspeed.sharding import start_watchdog

from .shard import shard_by_config


def prepare(
    accelerator: Any,
    *objects: Any,
    fuse_loss: Literal["always", True, False] | None = None,
    **options: Any,
) -> Any:
    """Shards the tables of the model in ``objects``, then calls
    ``accelerator.prepare(*objects, **options)``. The section ``"tp_embed"`` of the DeepSpeed config
    says how to shard, see :class:`tp_embed.integrations.deepspeed.EmbedConfig`. The optimizer in
    ``objects`` gets the new Parameters. The engine has the report as ``tp_embed_report`` and the
    watchdog, if the section has one, as ``tp_embed_watchdog``.

    Sets ``stage3_gather_16bit_weights_on_model_save`` unless the config does, so that
    ``accelerator.get_state_dict(engine)`` and ``save_model()`` return the whole model.

    :param fuse_loss: replaces the key of the section.
    :raises ValueError: the Accelerator does not use DeepSpeed, or there is not exactly one model.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        raise ValueError(
            "`accelerator` must use DeepSpeed, but does not. Pass it a `DeepSpeedPlugin`, or start "
            "the script with `accelerate launch --use_deepspeed`."
        )
    models = [found for found in objects if isinstance(found, Module)]
    if len(models) != 1:
        raise ValueError(f"`objects` must hold one model, but hold {len(models)}.")
    optimizers = [found for found in objects if isinstance(found, Optimizer)]
    groups = []
    for dummy in (found for found in objects if isinstance(found, DummyOptim)):
        dummy.params = list(dummy.params)  # A generator could be read only once.
        groups.append(dummy.params)
    report = shard_by_config(
        models[0],
        plugin.deepspeed_config,
        optimizers[0] if optimizers else None,
        groups[0] if groups else None,
        fuse_loss=fuse_loss,
    )
    _, section = read_section(plugin.deepspeed_config)
    prepared = accelerator.prepare(*objects, **options)
    for engine in prepared if isinstance(prepared, tuple) else (prepared,):
        if getattr(engine, "module", None) is models[0]:
            engine.tp_embed_report = report
            guard_full_values(engine.module, engine.optimizer)
            engine.tp_embed_watchdog = start_watchdog(section)
    return prepared
