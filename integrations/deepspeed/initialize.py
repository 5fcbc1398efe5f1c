"""`deepspeed.initialize()` with sharded tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import deepspeed
from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.surgery.report import ShardingReport

from .checks import check_made_optimizer, check_sub_groups
from .config import EmbedConfig, read_section
from .full_values import guard_full_values
from .own_tables import OwnTable
from .private import TORCH_DISTRIBUTED_DEFAULT_PORT, load_ds_config, merge_tp_model_init_into_config
from .sharding import shard_model, start_watchdog
from .table_checkpoints import refuse_tables
from .table_optimizers import TableOptimizers
from .timing import time_collectives
from .world import keep_apart


def initialize(
    args: Any = None,
    model: Module | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Shards the tables of ``model``, then calls :func:`deepspeed.initialize`, with the same
    arguments and results. The section ``"tp_embed"`` of the config says how to shard (see
    :class:`EmbedConfig`; its defaults apply without a section)::

        {"tensor_parallel": {"autotp_size": 8}, "tp_embed": {"strategy": "vocab"}, ...}

    The gang is AutoTP's group, or else the one of ``mpu``; without either, or with DeepSpeed's
    ``parallel_state_sp``, which has sequence groups only, tables stay whole. Logs a report,
    ``engine.tp_embed_report``. The watchdog, if the section has one, is
    ``engine.tp_embed_watchdog``; tables with an optimizer of their own are trained by
    ``engine.tp_embed_tables``, a :class:`TableOptimizers`. An existing optimizer and its groups get
    the new Parameters, in place.

    All ranks must call it. They compare their sections, tables, and torch seeds.

    :raises ValueError: the section is invalid, or DeepSpeed would silently not do what the config
        says; see also :func:`tp_embed.shard_embeddings`.
    :raises GangError: the ranks of a gang disagree.
    """
    if model is None:
        raise ValueError("`model` must be a `torch.nn.Module`, but is None instead.")
    args, full_config = _load_config(args, config if config is not None else config_params)
    ds_config, section = read_section(full_config)
    deepspeed.init_distributed(
        distributed_port=distributed_port, dist_init_required=dist_init_required
    )
    merge_tp_model_init_into_config(ds_config, mpu, mesh_param, deepspeed.comm)
    if model_parameters is not None:
        # Before the tables change: a generator would mix old and new Parameters.
        model_parameters = list(model_parameters)

    # The config key for `mesh_param`.
    sizes = {} if mesh_param is None else {"sequence_parallel_size": mesh_param[1]}
    own_tables: list[OwnTable] = []
    report = shard_model(
        model,
        ds_config | sizes,
        section,
        mpu=mpu,
        optimizer=optimizer,
        parameters=model_parameters,
        own_tables=own_tables,
    )

    items = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=ds_config,
        mesh_param=mesh_param,
    )
    if optimizer is not None:
        check_made_optimizer(items[0])
    if own_tables:
        items[0].tp_embed_tables = TableOptimizers(items[0], own_tables)
    else:
        refuse_tables(items[0])
    _complete(items[0], report, section)
    return cast(tuple[Any, Any, Any, Any], items)


def _complete(engine: Any, report: ShardingReport, section: EmbedConfig) -> None:
    """Checks an engine that was built, and gives it what it does for sharded tables."""
    check_sub_groups(engine)
    engine.tp_embed_report = report
    guard_full_values(engine.module, engine.optimizer)
    keep_apart(engine)
    time_collectives(engine)
    engine.tp_embed_watchdog = start_watchdog(section)


def _load_config(args: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """Returns ``args`` without the config, and the config, wherever it was given."""
    in_args = getattr(args, "deepspeed_config", None)
    if (config is None) == (in_args is None):
        given = "neither" if config is None else "both"
        raise ValueError(
            "The DeepSpeed config must be given as either `config` or `args.deepspeed_config`, "
            f"but is given as {given} instead."
        )
    if in_args is not None:
        args, config = copy.copy(args), in_args
        args.deepspeed_config = None
    return args, load_ds_config(config)
