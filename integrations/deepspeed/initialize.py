"""`deepspeed.initialize()` with sharded tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.tensor_parallel.init_utils import (
    load_ds_config,
    merge_tp_model_init_into_config,
)
from deepspeed.runtime.zero.utils import is_zero_param
from deepspeed.utils import log_dist
from torch import nn
from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.agreement import check_agreement, raise_together
from tp_embed.gang import FakeGang, Gang
from tp_embed.strategies import choose_strategies
from tp_embed.surgery import ShardingReport, shard_embeddings

from .checks import PIPELINE, check_choices, check_clipping, check_config, check_sparse
from .config import SECTION, EmbedConfig, read_section
from .gang import DeepSpeedGang


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
    """:func:`deepspeed.initialize`, which takes the same and returns the same, after the tables of
    ``model`` have been sharded as the section ``"tp_embed"`` of the config says (see
    :class:`EmbedConfig`; without one, as its defaults say)::

        {"tensor_parallel": {"autotp_size": 8}, "tp_embed": {"strategy": "vocab"}, ...}

    The gang is that of AutoTP, or else that of ``mpu``; without either, tables stay whole. The
    report of what was sharded is logged and is ``engine.tp_embed_report``. An optimizer, and
    parameter groups, that were built before get the new Parameters, in place.

    All ranks have to call it. They compare their sections, the tables, and the seeds of torch.

    :raises ValueError: the section holds what it may not, or the config is one with which DeepSpeed
        would not do what it says; see also :func:`tp_embed.shard_embeddings`.
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
    autotp_size = (ds_config.get("tensor_parallel") or {}).get("autotp_size", 0)
    if model_parameters is not None:
        # Before the tables change: a generator may have begun to give old ones.
        model_parameters = list(model_parameters)

    gang = _find_gang(model, autotp_size, mpu)
    check_agreement(
        gang,
        {
            f"the section `{SECTION}`": section.model_dump(),
            "the seed of torch": torch.initial_seed(),
        },
    )
    raise_together(gang, lambda: _check(model, gang, section, ds_config))
    report = ShardingReport(())
    if isinstance(model, PipelineModule):
        if gang.size > 1:
            _check_stages(model)
    elif not _is_out_of_reach(model, gang):
        report = _shard(model, gang, section, optimizer, model_parameters)
    log_dist(f"tp_embed over {gang}:\n{report}", ranks=[0])

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
    items[0].tp_embed_report = report
    return cast(tuple[Any, Any, Any, Any], items)


def _load_config(args: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """The config, wherever it is, and ``args`` without it."""
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


def _find_gang(model: Module, autotp_size: int, mpu: Any) -> Gang:
    if autotp_size > 1:
        return DeepSpeedGang.from_groups(tp_size=autotp_size)
    if isinstance(model, PipelineModule):
        mpu = model.mpu()
    if mpu is None:
        # The same layers and initial values as with tensor parallelism, on each rank alone.
        return FakeGang(get_accelerator().current_device_name())
    return DeepSpeedGang.from_mpu(mpu)


def _check(model: Module, gang: Gang, section: EmbedConfig, ds_config: dict[str, Any]) -> None:
    """Finds out what would be refused before anything is changed."""
    if gang.size > 1:
        check_config(ds_config)
    if isinstance(model, PipelineModule):
        if model.num_stages > 1:
            check_clipping(ds_config)
        return
    if _is_out_of_reach(model, gang):
        if section.init is not None:
            raise ValueError(
                f"`{SECTION}.init` must be left out for a model of `deepspeed.zero.Init` without "
                f"tensor parallelism, but is {section.init!r}. Initialize it where it is built."
            )
        return
    choices = choose_strategies(
        model, section.strategy, section.rules, section.tie_head, section.shard_head
    )
    check_choices(model, ds_config, choices)
    tables = [table for group, _ in choices for table in group.embeddings]
    if section.sparse or (section.sparse is None and any(table.sparse for table in tables)):
        check_sparse(ds_config)
    if section.shard_logits:
        from tp_embed.integrations.transformers import check_loss  # An optional dependency.

        check_loss(model)
        heads = {head: chosen for group, chosen in choices for head in group.heads}
        chosen = heads.get(cast(Any, model).get_output_embeddings(), "none")
        if chosen != "vocab":
            raise ValueError(
                f"The strategy for the output head must be 'vocab' with `{SECTION}.shard_logits`, "
                f"but is {chosen!r} instead. Set `{SECTION}.strategy` to 'vocab', or "
                f"`{SECTION}.shard_logits` to false."
            )


def _is_out_of_reach(model: Module, gang: Gang) -> bool:
    """Whether the Parameters are partitioned by `deepspeed.zero.Init` while there is no tensor
    parallelism, for which alone it would be worth to fetch them."""
    return isinstance(gang, FakeGang) and any(map(is_zero_param, model.parameters()))


def _shard(
    model: Module,
    gang: Gang,
    section: EmbedConfig,
    optimizer: Any,
    parameters: list[Any] | None,
) -> ShardingReport:
    report = shard_embeddings(
        model,
        gang,
        strategy=section.strategy,
        rules=section.rules,
        tie_head=section.tie_head,
        shard_head=section.shard_head,
        output=section.output,
        sparse=section.sparse,
        init_fn=section.init_fn,
        optimizer=optimizer if isinstance(optimizer, Optimizer) else None,
        parameters=parameters,
    )
    if section.shard_logits:
        from tp_embed.integrations.transformers import shard_logits

        shard_logits(model)
    return report


def _check_stages(model: PipelineModule) -> None:
    """Checks that no stage has a table that is not sharded. Each rank sees those of its own."""
    own = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    tables = sorted({name for names in of_all for name in names})
    if tables:
        raise ValueError(f"{PIPELINE} Not sharded are {tables}.")
