"""Tables with an optimizer of their own: finds them, and takes them out of a model's Parameters.

DeepSpeed trains, reduces and, at ZeRO 3, partitions whatever is in ``parameters()``. Such a table
becomes a buffer, which DeepSpeed keeps on each rank as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import log_dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from tp_embed.gang import Gang
from tp_embed.nn.mapped import MappedTable, map_table
from tp_embed.nn.table import Table
from tp_embed.optim import RowOptimizer
from tp_embed.parameter.sharded import local
from tp_embed.surgery.strategies import Choices

from .config import SECTION, EmbedConfig, TableConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class OwnTable:
    """A table with an optimizer of its own, whose learning rate ``follows`` the engine's or not.
    Several ``layers`` may share it. ``mapped`` is its place in memory-mapped files."""

    name: str
    layers: Sequence[Table]
    weight: Parameter
    optimizer: RowOptimizer
    follows: bool
    mapped: MappedTable | None = None

    @property
    def gang(self) -> Gang:
        """The gang that the table is sharded over."""
        return self.layers[0].gang


def check_own_tables(config: Mapping[str, Any], is_supported: bool) -> None:
    """Checks a DeepSpeed config with tables that have an optimizer of their own.

    :param is_supported: whether the model's tables can be taken out of its Parameters.
    :raises ValueError: they can't, or the engine's options would not reach them.
    """
    if not is_supported:
        raise ValueError(
            "`tp_embed.tables` must be left out for a `PipelineModule`, for a model of "
            "`deepspeed.zero.Init` without tensor parallelism, and with Accelerate or a Trainer, "
            "where tables can't leave the engine's optimizer. Build the model without "
            "`deepspeed.zero.Init`, and the engine by "
            "`tp_embed.integrations.deepspeed.initialize()`."
        )
    zero, half = config.get("zero_optimization") or {}, [n for n in _DTYPES if _is_on(config, n)]
    if zero.get("stage", 0) == 0 and half:
        raise ValueError(
            f"`zero_optimization.stage` must be 1, 2 or 3 for {half[0]} with `tp_embed.tables`, "
            "but is 0 instead: there the norm of gradients can't take in other tables. Set it to 1."
        )
    if zero.get("compute_grad_norm", True) is False:
        raise ValueError(
            "`zero_optimization.compute_grad_norm` must be true with `tp_embed.tables`, whose "
            "overflows are found by their norm, but is false instead. Leave it out."
        )
    if (config.get("checkpoint") or {}).get("use_node_local_storage") is True:
        raise ValueError(
            "`checkpoint.use_node_local_storage` must be false with `tp_embed.tables`, since each "
            "rank saves a part of them, but is true instead. Save to a directory that all nodes "
            "share."
        )
    for key, found in (
        ("zero_optimization.zenflow", zero.get("zenflow")),
        ("torch_autocast", _is_on(config, "torch_autocast")),
    ):
        if found:
            raise ValueError(
                f"`{key}` must be left out with `tp_embed.tables`, since it scales or delays "
                "gradients of its own Parameters only, but is set. Leave one of them out."
            )


def _is_on(config: Mapping[str, Any], key: str) -> bool:
    return (config.get(key) or {}).get("enabled") is True


def find_own_tables(
    model: Module, choices: Choices, section: EmbedConfig
) -> dict[tuple[str, ...], TableConfig]:
    """Returns the tables that ``section.tables`` names, by all their names.

    :param choices: the tables that will be sharded; others may be sharded already.
    :raises ValueError: a pattern matches no table, or a table cannot have an optimizer of its own.
    """
    if not section.tables:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[str, ...], str | None] = {}
    for group, chosen in choices:
        problem = None
        if chosen == "none":
            problem = (
                "must be sharded by 'embed', 'vocab' or 'world', but stays whole. Change its "
                "strategy"
            )
        elif group.heads or not group.embeddings:
            problem = (
                "must have no output head, whose gradient is dense, but has one. Untie the head"
            )
        elif not group.weight.requires_grad:
            problem = "must require a gradient, but is frozen. Train it"
        found[tuple(group.names)] = problem
    users: dict[Any, list[str]] = {}
    for name, module in modules.items():
        if "weight" in module._parameters:
            users.setdefault(module.weight, []).append(name)
    for sharing in users.values():
        layers = [modules[name] for name in sharing]
        if any(isinstance(layer, Table) for layer in layers):
            problem = None
            if not all(isinstance(layer, Table) for layer in layers):
                problem = "must have no output head, but has one. Leave it untied"
            elif not layers[0].weight.requires_grad:
                problem = "must require a gradient, but is frozen. Train it"
            found.setdefault(tuple(sharing), problem)
    own = {}
    for names, problem in found.items():
        config = _first_match(section.tables, names)
        if config is not None and problem:
            raise ValueError(
                f"The table '{names[0]}' {problem}, or take it out of `{SECTION}.tables`."
            )
        if config is not None:
            own[names] = config
    _check_patterns(section, [name for names in found for name in names])
    return own


def _first_match(tables: Mapping[str, TableConfig], names: Sequence[str]) -> TableConfig | None:
    for pattern, config in tables.items():
        if any(fnmatchcase(name, pattern) for name in names):
            return config
    return None


def _check_patterns(section: EmbedConfig, names: Sequence[str]) -> None:
    for pattern in section.tables:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`{SECTION}.tables` must match names of tables, but {pattern!r} matches none of "
                f"{sorted(names)}."
            )


def set_apart(
    model: Module,
    own: Mapping[tuple[str, ...], TableConfig],
    ds_config: Mapping[str, Any],
    device: torch.device,
    groups: Sequence[Any],
) -> list[OwnTable]:
    """Takes the tables ``own`` out of the Parameters of ``model``. They get sparse gradients, the
    dtype of the engine, and ``device``, to which DeepSpeed moves the model.

    :param groups: an optimizer, or lists of Parameters or groups, that lose the tables.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    enabled = [name for name in _DTYPES if _is_on(ds_config, name)]
    tables = []
    for names, config in own.items():
        layers: list[Any] = list(dict.fromkeys(modules[name] for name in names))
        weight = layers[0].weight
        for layer in layers:
            layer.reuse_grad = False
            layer.sparse = True
        dtype = _DTYPES[enabled[0]] if enabled else weight.dtype
        mapped = None
        if config.memory is None:
            weight.data = local(weight).to(device, dtype)
        else:
            mapped = _map(names[0], layers[0], dtype, config)
        for layer in layers:
            layer.set_apart()
        for held in groups:
            _remove(held, weight)
        optimizer, follows = config.make(weight), config.lr is None
        tables.append(OwnTable(names[0], layers, weight, optimizer, follows, mapped))
    return tables


def _map(name: str, layer: Table, dtype: torch.dtype, config: TableConfig) -> MappedTable:
    """Moves a table to memory-mapped files."""
    if layer.gang.size < dist.get_world_size():
        raise ValueError(
            f"The table '{name}' in memory-mapped files must be sharded over all "
            f"{dist.get_world_size()} processes, but is over {layer.gang.size}: each data-parallel "
            f"rank would have files of its own. Set `{SECTION}.rules` to {{'{name}': 'world'}}."
        )
    assert config.memory is not None
    resident = {} if config.resident is None else {"resident": config.resident}
    mapped = map_table(layer, Path(config.memory) / name, dtype=dtype, **resident)
    log_dist(f"tp_embed: '{name}' is in {mapped.path}, at step {mapped.step}", ranks=[0])
    return mapped


def _remove(held: Any, weight: Tensor) -> None:
    """Removes ``weight`` from an optimizer, or from a list of Parameters, pairs or groups."""
    if isinstance(held, Optimizer):
        held.state.pop(weight, None)
        held = held.param_groups
    if not isinstance(held, list):
        return
    for entry in held:
        if isinstance(entry, dict):
            _remove(entry["params"], weight)
    held[:] = [e for e in held if (e[1] if isinstance(e, tuple) else e) is not weight]
