"""Tables that are sharded over all processes, in an engine at ZeRO 0.

Data-parallel ranks hold different shards of such a table, each with the gradient of all batches.
DeepSpeed would take the shards for copies: it would overwrite them with the first rank's, and
average their gradients and norms. Its treatment of experts, which differ between ranks too, does
not fit: it needs a `MoE` layer, divides gradients that are averaged already, clips by a mean of the
ranks' norms, and finds experts by the names of their files. So the engine leaves these Parameters
out where it averages over ranks, and counts them once in norms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils import clip_grads_with_norm_

from tp_embed.checkpoint import hook_state_dict
from tp_embed.nn.embedding import RowWiseEmbedding
from tp_embed.parameter.norms import get_total_norm

from .private import mark_distinct, norm_of_copies, replace_clipping, without_reduction


def tables_of_all(model: Module) -> dict[str, RowWiseEmbedding]:
    """Returns the tables of ``model`` that are sharded over several ranks with ids of their own,
    and are among its Parameters."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, RowWiseEmbedding)}
    return {
        name: table
        for name, table in found.items()
        if table.gang.size > 1 and "weight" in table._parameters
    }


def check_tables_of_all(
    model: Module,
    names: Iterable[str],
    own: Collection[str],
    ds_config: Mapping[str, Any],
    mpu: Any,
) -> None:
    """Checks the tables of ``model`` with ids of their own on each rank, and marks their weights.

    :param names: the names of tables that will be sharded so.
    :param own: the names of tables with an optimizer of their own, which the engine leaves alone.
    :raises ValueError: the engine would train them wrongly.
    """
    made = tables_of_all(model)
    for name, table in made.items():
        if table.grad_reduction != "mean" or table.gang.size != dist.get_world_size():
            raise ValueError(
                f"The table '{name}' must have `grad_reduction='mean'`, as an engine averages "
                f"gradients, and a gang of all {dist.get_world_size()} processes, but has "
                f"{table.grad_reduction!r} and {table.gang.size}. Use `DeepSpeedGang.from_world()`."
            )
    names = [name for name in (*names, *made) if name not in own]
    if not names:
        return
    if own:
        raise ValueError(
            f"The tables {names}, which are sharded over all processes, must have an optimizer of "
            f"their own, too, where {sorted(own)} have one. Name them in `tp_embed.tables`."
        )
    if isinstance(model, PipelineModule):
        raise ValueError(
            f"The tables {names} must not be sharded over all processes in a `PipelineModule`, "
            "since its stages do not all look up ids. Use a `VocabShardedEmbedding`."
        )
    asked = {name: (ds_config.get(name) or {}).get("enabled") for name in _PRECISIONS}
    asked["zero_optimization.stage"] = (ds_config.get("zero_optimization") or {}).get("stage", 0)
    ulysses = hasattr(mpu, "initialize_sequence_parallel")
    asked["sequence parallelism"] = ulysses or ds_config.get("sequence_parallel_size", 1) > 1
    if found := {name: value for name, value in asked.items() if value}:
        raise ValueError(
            "An engine must be at ZeRO 0, in fp32 and without sequence parallelism for tables that "
            f"are sharded over all processes, {names}, but has {found}: DeepSpeed would partition "
            "or average shards over ranks that hold different ones. Set `zero_optimization.stage` "
            "to 0, give them an optimizer of their own in `tp_embed.tables`, or another strategy "
            "in `tp_embed.rules`."
        )
    for table in made.values():
        mark_distinct(table.weight)


_PRECISIONS = "bf16", "fp16", "torch_autocast"


def keep_apart(engine: Any) -> None:
    """Makes ``engine`` treat tables that are sharded over all processes as one table each."""
    tables = list(tables_of_all(engine.module).values())
    if not tables:
        return
    weights = list(dict.fromkeys(table.weight for table in tables))
    without_reduction(engine, weights)
    replace_clipping(engine, lambda: _clip(engine, weights))
    for name in ("save_checkpoint", "load_checkpoint"):
        setattr(engine, name, _with_whole_tables(getattr(engine, name), engine, tables))


def _clip(engine: Any, weights: list[Parameter]) -> None:
    """Clips all gradients by the norm of the whole model."""
    known = set(weights)
    copies = [p for p in engine.module.parameters() if p not in known and p.grad is not None]
    shards = [p for p in weights if p.grad is not None]
    own: Tensor = get_total_norm([p.grad for p in shards if p.grad is not None])
    total = own.square()
    if copies:
        total = total + norm_of_copies(copies, engine.mpu).square().to(own.device)
    clip_grads_with_norm_([*copies, *shards], engine.gradient_clipping(), total.sqrt().squeeze())


def _with_whole_tables(
    method: Callable[..., Any], engine: Any, tables: list[RowWiseEmbedding]
) -> Callable[..., Any]:
    """Returns a method of ``engine`` whose checkpoints hold these tables, and their optimizer
    states, whole: DeepSpeed would save the first data-parallel rank's shards."""

    @wraps(method)
    def with_whole_tables(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            groups = getattr(engine.optimizer, "param_groups", ())
            trained = {parameter for group in groups for parameter in group["params"]}
            for table in tables:
                optimizer = engine.optimizer if table.weight in trained else ()
                stack.enter_context(hook_state_dict(table, optimizer=optimizer))
                trained.discard(table.weight)  # Several tables may share it.
            return method(*args, **kwargs)

    return with_whole_tables
