"""Plans the sharding of a model's tables, and has all ranks agree on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.gang import Gang
from tp_embed.gang.agreement import Facts, meet
from tp_embed.parameter.optimizers import check_optimizer, forget, mark_replaced
from tp_embed.surgery.adapters import loaded_adapters
from tp_embed.surgery.carry import check_module, check_parameter
from tp_embed.surgery.change import TableChange, as_standard, make_change
from tp_embed.surgery.discovery import TableGroup, check_shardable, check_weight, skip
from tp_embed.surgery.optimizer import Groups, check_groups, repoint_groups, repoint_optimizer
from tp_embed.surgery.options import ShardingOptions, Strategy
from tp_embed.surgery.report import ShardingReport
from tp_embed.surgery.strategies import (
    Choices,
    choose_rows,
    choose_strategies,
    tables_to_choose_for,
)


@dataclass
class ShardingPlan:
    """Plans a change for each table of ``model``. Nothing changes until :meth:`apply`.

    :param choices: the tables, each with its strategy.
    :param rows: the rows that train, for each table, or ``None`` for all.
    :param world: the gang of tables with the strategy ``"world"``.
    :param left: the names of tables that stay whole for another tool to cut.
    """

    model: Module
    gang: Gang
    options: ShardingOptions
    choices: Choices
    rows: list[Tensor | None]
    world: Gang
    left: Collection[str] = ()
    optimizer: Optimizer | None = None
    parameters: Groups | None = None
    changes: list[TableChange] = field(default_factory=list)

    def check(self) -> None:
        """Checks everything but the values of tables. No communication.

        :raises ValueError, TypeError: as :func:`tp_embed.shard_embeddings`.
        """
        self.gang.check_model(self.model)
        sharded = [group for group, chosen in self.choices if chosen != "none"]
        if self.optimizer is not None:
            check_groups("optimizer.param_groups", self.optimizer.param_groups, self.model)
            cut = [g.weight for g, c in self.choices if c != "none" and self.gang_of(c).size > 1]
            if cut:
                check_optimizer(self.optimizer, cut)
        if self.parameters is not None:
            check_groups("parameters", self.parameters, self.model)
        for group, chosen in self.choices:
            shape = self.gang.whole_shape(group.weight)
            if chosen == "world":
                self._check_own_ids(group)
            if chosen != "none":
                check_shardable(group, shape)
                self._check_carried(group, self.gang_of(chosen))
                for embedding in group.embeddings:
                    as_standard(embedding, shape, self.options)
            elif self.options.init_fn is not None:
                check_weight(group, shape)
        tables = {module for group in sharded for module in (*group.embeddings, *group.heads)}
        for adapter in loaded_adapters():
            adapter.check(self.model, tables)

    def _check_own_ids(self, group: TableGroup) -> None:
        name = group.names[0]
        if group.heads:
            raise ValueError(
                f"The table '{name}' must not be shared with an output head for the strategy "
                f"'world', but is with {group.shared_with or [name]}: a head needs the hidden "
                "states of all ranks that hold its classes. Use 'vocab' for it, or untie it."
            )
        if self.options.output != "replicated":
            raise ValueError(
                f"`output` must be 'replicated' for the strategy 'world' of '{name}', which gives "
                f"each rank the rows of all of its ids, but is {self.options.output!r} instead."
            )

    def gang_of(self, chosen: Strategy) -> Gang:
        """Returns the gang for tables with the strategy ``chosen``."""
        return self.world if chosen == "world" else self.gang

    def _check_carried(self, group: TableGroup, gang: Gang) -> None:
        name = group.names[0]
        if gang.size > 1:  # At size 1 the block is the whole table.
            check_parameter(group.weight, name, skip(name))
        for module in (*group.embeddings, *group.heads):
            check_module(module, name, skip(name))

    def note_facts(self, facts: Facts) -> None:
        """Adds to ``facts`` everything that must be the same on every rank of the gang."""
        facts |= self.options.facts()
        for (group, chosen), train in zip(self.choices, self.rows, strict=True):
            name = group.names[0]
            facts[f"the rows of '{name}' that train"] = "all" if train is None else _digest(train)
            facts[f"the strategy for '{name}'"] = chosen
            facts[f"the classes at '{name}'"] = [
                type(module).__name__ for module in (*group.embeddings, *group.heads)
            ]
            facts[f"the shape of '{name}'"] = self.gang.whole_shape(group.weight)
            facts[f"the dtype of '{name}'"] = group.weight.dtype

    def make(self, facts: Facts, *, alone: bool) -> None:
        """Makes the new modules, and adds checksums of the old tables to ``facts``.

        :param alone: whether this needs no communication. If it does, a rank continues after an
            error, since others fetch and draw the next tables with it, and raises at the end.
        """
        error: BaseException | None = None
        for (group, chosen), train in zip(self.choices, self.rows, strict=True):
            if chosen == "none" and self.options.init_fn is None:
                shape = self.gang.whole_shape(group.weight)
                self.changes.append(TableChange(group, chosen, shape))
                continue
            with self.gang.whole(*group.parameters):
                try:
                    if self.options.init_fn is None:
                        key = f"the values of '{group.names[0]}' (a checksum)"
                        facts[key] = _checksum(group.weight)
                    gang = self.gang_of(chosen)
                    change = make_change(group, chosen, gang, self.options, train)
                    self.changes.append(change)
                except BaseException as e:
                    if alone:
                        raise
                    error = error or e
        if error is not None:
            raise error

    def apply(self) -> ShardingReport:
        """Replaces the old modules. All ranks must call it, after they have agreed."""
        shards = {change.group.weight: change.shard for change in self.changes if change.shard}
        report = ShardingReport(tuple(change.apply(self.gang) for change in self.changes))
        self.gang.describe_model(self.model)
        for whole, shard in shards.items():
            if shard.parameter is not whole:
                mark_replaced(whole)
        forget()
        if self.optimizer is not None:
            repoint_optimizer(self.optimizer, shards)
        if self.parameters is not None:
            repoint_groups(self.parameters, shards)
        for adapter in loaded_adapters():
            adapter.adapt(self.model)
        return report


def plan_sharding(
    model: Module,
    gang: Gang,
    options: ShardingOptions,
    *,
    optimizer: Optimizer | None = None,
    parameters: Groups | None = None,
    leave: Callable[[Sequence[TableGroup]], Collection[str]] = lambda tables: (),
    world: Gang | None = None,
) -> ShardingPlan:
    """Chooses a change for each table. No communication; doesn't change the model.

    :param leave: takes the tables, and returns the names of tables that stay whole unless a rule
        names them.
    :param world: the gang for the strategy ``"world"``, if a table can have it.
    """
    tables = tables_to_choose_for(model, options)
    left = leave(tables)
    choices = choose_strategies(tables, options, gang.size, left)
    rows = choose_rows(choices, options.train_rows)
    return ShardingPlan(
        model, gang, options, choices, rows, world or gang, left, optimizer, parameters
    )


_Plan = TypeVar("_Plan", bound=ShardingPlan | None)


def agree_on_plan(
    model: Module, gang: Gang, prepare: Callable[[Facts], _Plan], world: Gang | None = None
) -> _Plan:
    """Runs ``prepare``, checks the plan it returns, and makes its modules. All ranks must call it.
    Either all return a plan that is ready to apply, or all raise.

    The ranks meet once; twice if tables are fetched or drawn, since these communicate and need an
    agreement on strategies and shapes before; and once more with all ranks of ``world``, which cut
    their parts of its tables out of their own whole ones.

    :param prepare: the first part of the ``action`` of :func:`meet`. Returns ``None`` on all ranks
        if there is nothing to shard.
    :param world: the gang for the strategy ``"world"``, if a table can have it.
    :raises GangError: ranks disagree, or another rank has failed.
    """
    others = gang.fetched_with(model)
    told = [*others, *([world] if world else [])]
    known: Facts = {}

    def choose_and_check(facts: Facts) -> tuple[_Plan, bool]:
        plan = prepare(facts)
        if plan is None:
            return plan, False
        plan.check()
        facts["whether the Parameters are partitioned"] = bool(others)
        plan.note_facts(facts)
        sends = bool(others) or plan.options.init_fn is not None
        if not sends:
            plan.make(facts, alone=True)
        known.update(facts)
        return plan, sends

    def make(facts: Facts) -> None:
        if plan is not None:
            plan.make(facts, alone=False)
        known.update(facts)

    plan, sends = meet(gang, choose_and_check, told)
    if plan is not None and sends:
        meet(gang, make, told)
    if world is not None:
        choices = [] if plan is None else plan.choices
        names = [group.names[0] for group, chosen in choices if chosen == "world"]
        shared = {k: v for k, v in known.items() if any(f"'{name}'" in k for name in names)}
        meet(world, lambda facts: facts.update(shared))
    return plan


def _checksum(table: Tensor) -> str | None:
    """Hashes about 256 items: tables drawn from different seeds differ in all of them."""
    if table.is_meta or not table.numel():
        return None
    return _digest(table.detach().flatten()[:: max(1, table.numel() // 256)].cpu())


def _digest(items: Tensor) -> str:
    data = items.contiguous().view(torch.uint8).tolist()
    return hashlib.blake2b(bytes(data), digest_size=8).hexdigest()
