"""Shards the tables of a model according to a DeepSpeed config, before there is an engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.utils import log_dist
from torch import nn
from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.agreement import Facts
from tp_embed.nn.embedding import StandardEmbedding
from tp_embed.nn.head import OutputHead
from tp_embed.nn.table import Table
from tp_embed.surgery.plan import ShardingPlan, agree_on_plan, plan_sharding
from tp_embed.surgery.report import ShardingReport
from tp_embed.surgery.strategies import Choices
from tp_embed.watchdog import Watchdog

from .autotp import NOTE, per_head_tables
from .checks import (
    PIPELINE,
    check_choices,
    check_clipping,
    check_config,
    check_empty_shards,
    check_optimizer_type,
    check_reuse_grad,
    check_sparse,
    check_tied_stages,
)
from .config import SECTION, EmbedConfig
from .gang import DeepSpeedGang
from .own_tables import OwnTable, check_own_tables, find_own_tables, set_apart
from .private import is_zero_param
from .sequence import check_sequence_groups
from .world import check_tables_of_all

# The models that a section of a DeepSpeed config was applied to.
sharded_by_section: WeakSet[Module] = WeakSet()


def shard_model(
    model: Module,
    ds_config: dict[str, Any],
    section: EmbedConfig,
    *,
    mpu: Any = None,
    optimizer: Any = None,
    parameters: Any = None,
    check: Callable[[Gang], None] = lambda gang: None,
    own_tables: list[OwnTable] | None = None,
) -> ShardingReport:
    """Shards the tables of ``model`` by ``section``, for an engine of ``ds_config``.

    All ranks must call it, after ``deepspeed.init_distributed()``. They compare their sections,
    tables, and torch seeds.

    :param ds_config: the DeepSpeed config without the section.
    :param optimizer: gets the new Parameters, unless it is a function that builds an optimizer.
    :param parameters: Parameters or groups for a later optimizer; updated in place.
    :param check: may refuse the model too; called before anything changes.
    :param own_tables: gets the tables with an optimizer of their own, for the engine; ``None`` if
        the caller cannot train them.
    :raises ValueError: as :func:`initialize`.
    :raises GangError: the ranks of a gang disagree.
    """
    autotp_size = (ds_config.get("tensor_parallel") or {}).get("autotp_size", 0)
    gang = _find_gang(model, autotp_size, mpu)
    dp_size = _dp_size(model, gang, mpu)
    world = DeepSpeedGang.from_world() if section.options.uses_world else None

    def prepare(facts: Facts) -> ShardingPlan | None:
        facts[f"the section `{SECTION}`"] = section.model_dump()
        facts["the seed of torch"] = torch.initial_seed()
        if gang.size > 1:
            check_config(ds_config)
            check_sequence_groups(model, mpu, ds_config)
        plan = _plan(model, gang, section, ds_config, optimizer, parameters, world)
        if section.tables:
            check_own_tables(ds_config, plan is not None and own_tables is not None)
        choices = [] if plan is None else plan.choices
        owned = [group.names[0] for group, chosen in choices if chosen == "world"]
        own = {name for names in find_own_tables(model, choices, section) for name in names}
        check_tables_of_all(model, owned, own, ds_config, mpu)
        if plan is not None:
            _check_plan(plan, section, ds_config, dp_size)
        elif section.fuse_loss:
            raise ValueError(
                f"`{SECTION}.fuse_loss` must be false for a `{type(model).__name__}` whose tables "
                "stay as they are, since it needs an `OutputHead`. Leave it out; in a pipeline, "
                "call `OutputHead.loss()` in the last stage."
            )
        check(gang)
        return plan

    plan = agree_on_plan(model, gang, prepare, world)
    report = ShardingReport(())
    if plan is not None:
        own = find_own_tables(model, plan.choices, section)
        report = _apply(plan, section)
        if own_tables is not None:
            own_tables += set_apart(model, own, ds_config, gang.device, (optimizer, parameters))
    if isinstance(model, PipelineModule):
        _check_stages(model, gang, ds_config, dp_size)
    sharded_by_section.add(model)
    log_dist(f"tp_embed over {gang}:\n{report}", ranks=[0])
    return report


def start_watchdog(section: EmbedConfig) -> Watchdog | None:
    """Starts the watchdog of the section, if it has one. Call it once the engine is built: until
    then, ranks may wait long while ops compile."""
    return None if section.watchdog is None else Watchdog.start(section.watchdog.timeout)


def _find_gang(model: Module, autotp_size: int, mpu: Any) -> Gang:
    if autotp_size > 1:
        return DeepSpeedGang.from_groups(tp_size=autotp_size)
    if isinstance(model, PipelineModule):
        mpu = model.mpu()
    # DeepSpeed's `parallel_state_sp` calls its sequence groups model-parallel groups as well.
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):
        # The same layers and initial values as with tensor parallelism, on each rank alone.
        return FakeGang(get_accelerator().current_device_name())
    return DeepSpeedGang.from_mpu(mpu)


def _dp_size(model: Module, gang: Gang, mpu: Any) -> int:
    if isinstance(model, PipelineModule):
        mpu = model.mpu()
    size = getattr(mpu, "get_data_parallel_world_size", None)
    # AutoTP has no pipeline stages.
    return dist.get_world_size() // gang.size if size is None else int(size())


def _plan(
    model: Module,
    gang: Gang,
    section: EmbedConfig,
    ds_config: dict[str, Any],
    optimizer: Any,
    parameters: list[Any] | None,
    world: Gang | None,
) -> ShardingPlan | None:
    """Returns ``None`` if the tables stay as they are."""
    if isinstance(model, PipelineModule):
        if model.num_stages > 1:
            check_clipping(ds_config)
        return None
    if _is_out_of_reach(model, gang):
        if section.init is not None:
            raise ValueError(
                f"`{SECTION}.init` must be left out for a model of `deepspeed.zero.Init` without "
                f"tensor parallelism, but is {section.init!r}. Initialize it where it is built."
            )
        return None
    return plan_sharding(
        model,
        gang,
        section.options,
        optimizer=optimizer if isinstance(optimizer, Optimizer) else None,
        parameters=parameters,
        leave=lambda tables: per_head_tables(model, ds_config, tables),
        world=world,
    )


def _check_plan(
    plan: ShardingPlan, section: EmbedConfig, ds_config: dict[str, Any], dp_size: int
) -> None:
    check_choices(plan.model, ds_config, plan.choices, plan.left)
    own = {name for names in find_own_tables(plan.model, plan.choices, section) for name in names}
    engine_trains = [(group, chosen) for group, chosen in plan.choices if group.names[0] not in own]
    check_empty_shards(plan.model, plan.gang, ds_config, engine_trains)
    cut = [(group, chosen) for group, chosen in engine_trains if plan.gang_of(chosen).size > 1]
    check_optimizer_type(ds_config, cut)
    _check_gradients(plan, engine_trains, own, ds_config, dp_size)
    heads = {head: chosen for group, chosen in plan.choices for head in group.heads}
    if section.fuse_loss:
        from tp_embed.integrations.transformers import fusible_model  # An optional dependency.

        head = fusible_model(plan.model).get_output_embeddings()
        if heads.get(head, "none") == "none" and not isinstance(head, OutputHead):
            raise ValueError(
                f"The output head must be sharded with `{SECTION}.fuse_loss`, but is {head} and "
                "stays whole. Let it be sharded (`shard_head`, `tie_head`, `strategy`, `rules`), "
                f"or set `{SECTION}.fuse_loss` to false."
            )
    if section.shard_logits:
        from tp_embed.integrations.transformers import check_loss

        check_loss(plan.model)
        chosen = heads.get(cast(Any, plan.model).get_output_embeddings(), "none")
        if chosen != "vocab":
            raise ValueError(
                f"The strategy for the output head must be 'vocab' with `{SECTION}.shard_logits`, "
                f"but is {chosen!r} instead. Set `{SECTION}.strategy` to 'vocab', or "
                f"`{SECTION}.shard_logits` to false."
            )


def _apply(plan: ShardingPlan, section: EmbedConfig) -> ShardingReport:
    report = plan.apply()
    if section.fuse_loss:
        from tp_embed.integrations.transformers import fuse_loss

        fuse_loss(plan.model, in_evaluation=section.fuse_loss == "always")
    if section.shard_logits:
        from tp_embed.integrations.transformers import shard_logits

        shard_logits(plan.model)
    notes = dict.fromkeys(plan.left, NOTE)
    return ShardingReport(
        tuple(replace(table, note=notes.get(table.name, "")) for table in report.tables)
    )


def _check_gradients(
    plan: ShardingPlan,
    choices: Choices,
    own: Collection[str],
    ds_config: dict[str, Any],
    dp_size: int,
) -> None:
    """Checks that the engine supports the gradients of the tables, including tables that are
    sharded already, but not the ``own`` ones, with an optimizer of their own."""
    modules = dict(plan.model.named_modules())
    sharded = _sharded_tables(module for name, module in modules.items() if name not in own)

    def is_asked(option: str) -> bool:
        wanted = getattr(plan.options, option)
        return any(getattr(table, option) for table in sharded) or any(
            getattr(table, option, False) if wanted is None or chosen == "none" else wanted
            for group, chosen in choices
            for table in group.embeddings
        )

    if is_asked("sparse"):
        check_sparse(ds_config)
    if is_asked("reuse_grad"):
        check_reuse_grad(ds_config, dp_size)


def _sharded_tables(modules: Iterable[Module]) -> list[Table]:
    tables = (module for module in modules if isinstance(module, Table))
    return [table for table in tables if not isinstance(table, StandardEmbedding)]


def _is_out_of_reach(model: Module, gang: Gang) -> bool:
    """Returns whether `deepspeed.zero.Init` has partitioned the Parameters and there is no tensor
    parallelism: then gathering them is not worthwhile."""
    return isinstance(gang, FakeGang) and any(map(is_zero_param, model.parameters()))


def _check_stages(
    model: PipelineModule, gang: Gang, ds_config: dict[str, Any], dp_size: int
) -> None:
    """Gathers what each rank knows of the tables of its own stage, and checks that all tables are
    sharded and that the engine supports their gradients."""
    modules = dict(model.named_modules())
    own = [name for name, m in modules.items() if isinstance(m, nn.Embedding) and gang.size > 1]
    own_reuse = any(table.reuse_grad for table in _sharded_tables(model.modules()))
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, (own, own_reuse))
    tables = sorted({name for names, _ in of_all for name in names})
    if tables:
        raise ValueError(f"{PIPELINE} Not sharded are {tables}.")
    if any(reuse for _, reuse in of_all):
        check_reuse_grad(ds_config, dp_size)
        check_tied_stages(model)
