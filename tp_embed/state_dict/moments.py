"""Hooks that save and load the optimizer states of sharded tables, such as moments, in the form of
the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.nn.gang_layer import SHARD_RECORD
from tp_embed.nn.head import ShardedLayer
from tp_embed.optim import RowOptimizer
from tp_embed.state_dict.dtensors import DTensors
from tp_embed.state_dict.shards import (
    EXPORTS,
    ROW_EXPORTS,
    cut_block,
    is_partitioned,
    layers_of,
    record_of,
)

_State = dict[str, Any]


@contextmanager
def hook_optimizers(
    model: Module, mode: str, optimizers: Optimizer | Iterable[Optimizer]
) -> Iterator[None]:
    """Hooks the optimizers as documented in :func:`tp_embed.checkpoint.hook_state_dict`."""
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    own = {*model.parameters(), *(layer.weight for _, layer in layers_of(model))}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "`optimizer` must be a `torch.optim.Optimizer`, or several, but is a "
                f"`{type(optimizer).__name__}` instead. An engine saves its own optimizer."
            )
        if not any(parameter in own for parameter in _parameters(optimizer)):
            raise ValueError(
                "`optimizer` must hold Parameters of `model`, but holds none of them. Build it "
                "over `model.parameters()`, after the tables were sharded."
            )
    hooks = _Hooks(model, mode)
    with ExitStack() as stack:
        for optimizer in optimizers:
            if mode == "dtensor" and isinstance(optimizer, RowOptimizer):
                optimizer.init_state()  # torch would make it by a step with dense gradients.
        if mode != "sharded":
            stack.enter_context(_refused(hooks, optimizers))
        for optimizer in optimizers:
            saved = optimizer.register_state_dict_post_hook(hooks.after_save)
            stack.callback(saved.remove)
            loading = optimizer.register_load_state_dict_pre_hook(hooks.before_load)
            stack.callback(loading.remove)
        yield


@contextmanager
def _refused(hooks: _Hooks, known: list[Optimizer]) -> Iterator[None]:
    """In this context any other optimizer of cut tables raises in ``state_dict()``, which would
    hold different blocks under one name. Patches ``Optimizer``, since torch has no global hook."""
    original = Optimizer.state_dict

    def state_dict(self: Optimizer) -> _State:
        tables = hooks.tables()
        names = [tables[p][0] for p in _parameters(self) if p in tables and _is_cut(tables[p])]
        if names and not any(self is optimizer for optimizer in known):
            raise ValueError(
                f"The state of the optimizer of `{names[0]}` must take the form of its table, "
                "since each rank holds another block of it under one name, but the optimizer was "
                "not passed to `hook_state_dict()`. Pass it: `optimizer=optimizer`."
            )
        return original(self)

    Optimizer.state_dict = state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.state_dict = original  # type: ignore[method-assign]


class _Hooks:
    def __init__(self, model: Module, mode: str) -> None:
        self._model, self._mode = model, mode

    def after_save(self, optimizer: Optimizer, state_dict: _State) -> None:
        tables = self.tables()
        found = {i: tables[p] for i, p in enumerate(_parameters(optimizer)) if p in tables}
        found = {i: table for i, table in found.items() if i in state_dict["state"]}
        if self._mode == "sharded":
            records = {i: record_of(layer) for i, (_, layer) in found.items()}
            state_dict[SHARD_RECORD] = {
                i: record for i, record in records.items() if _is_cut(found[i])
            }
            return
        rows = _row_states(optimizer)
        for i, table in found.items():  # Check all before sending any.
            _check_states(state_dict["state"][i], *table, rows)
        for i, (_, layer) in found.items():
            state_dict["state"][i] = _exported(state_dict["state"][i], layer, self._mode, rows)

    def before_load(self, optimizer: Optimizer, state_dict: _State) -> _State | None:
        keys = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        parameters = _parameters(optimizer)
        if len(keys) != len(parameters):  # torch raises a better error.
            return None
        state, tables = dict(state_dict["state"]), self.tables()
        pairs = zip(keys, parameters, strict=True)
        found = {key: tables[p] for key, p in pairs if p in tables and key in state}
        records = state_dict.get(SHARD_RECORD, {})
        rows = _row_states(optimizer)
        dtensors: dict[str, tuple[DTensor, Any]] = {}
        for key, (name, layer) in found.items():
            for path, value in _tensors(state[key], name):
                if isinstance(value, DTensor):
                    dtensors[path] = value, layer.gang
        errors: list[str] = []
        load = partial(_loaded, rows=rows, dtensors=DTensors(dtensors), errors=errors)
        for key, (name, layer) in found.items():
            state[key] = _mapped(state[key], name, partial(load, layer, records.get(key)))
        if errors:
            raise ValueError("The state of the optimizer can't be loaded: " + "\n".join(errors))
        return {**state_dict, "state": state}

    def tables(self) -> dict[Tensor, tuple[str, ShardedLayer]]:
        """Returns the layers by their weights, with the first name of each."""
        tables: dict[Tensor, tuple[str, ShardedLayer]] = {}
        for name, layer in layers_of(self._model):
            if not is_partitioned(layer):
                tables.setdefault(layer.weight, (f"{name}weight", layer))
        return tables


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _row_states(optimizer: Optimizer) -> Mapping[str, tuple[int, ...]]:
    """Returns the states with one value for each row, with their shape after the rows."""
    return optimizer.row_states if isinstance(optimizer, RowOptimizer) else {}


def _name_of(path: str) -> str:
    """Returns the name of the state at ``path``."""
    return path.rpartition(".")[2]


def _is_cut(table: tuple[str, ShardedLayer]) -> bool:
    return table[1].gang.size > 1


def _is_number(value: Tensor) -> bool:
    """Returns whether ``value`` is a single number, such as a step count."""
    return value.shape in ((), (1,))


def _check_states(
    state: Any, name: str, layer: ShardedLayer, rows: Mapping[str, tuple[int, ...]]
) -> None:
    for path, value in _tensors(state, name):
        if _name_of(path) in rows:
            continue
        if value.shape != layer.weight.shape and not _is_number(value) and layer.gang.size > 1:
            raise ValueError(
                "The optimizer must keep states of the shape of a sharded table, or single "
                f"numbers, but `{path}` has the shape {tuple(value.shape)} for a shard of "
                f"{tuple(layer.weight.shape)}, and can't be gathered. Save a file for each rank: "
                "`hook_state_dict(model, 'sharded', optimizer=...)`."
            )


def _exported(
    state: Any, layer: ShardedLayer, mode: str, rows: Mapping[str, tuple[int, ...]]
) -> Any:
    def export(path: str, value: Tensor) -> Tensor:
        if _name_of(path) in rows:
            return ROW_EXPORTS[mode](layer, value)
        return EXPORTS[mode](layer, value) if value.shape == layer.weight.shape else value

    return _mapped(state, "", export)


def _loaded(
    layer: ShardedLayer,
    record: object,
    path: str,
    value: Tensor,
    *,
    rows: Mapping[str, tuple[int, ...]],
    dtensors: DTensors,
    errors: list[str],
) -> Tensor:
    """Returns this rank's block of ``value``, in its own memory."""
    is_whole = layer.gang.size == 1 and not isinstance(value, DTensor)
    tail = rows.get(_name_of(path))
    is_number = tail is None and _is_number(value)
    if is_whole or is_number or record == record_of(layer):
        return value
    try:
        block = cut_block(layer, path, value, dtensors, record, tail)
    except ValueError as e:
        errors.append(f"`{path}` {e}")
        return value
    is_part = block.untyped_storage().nbytes() > block.nbytes
    return block.clone(memory_format=torch.contiguous_format) if is_part else block


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []

    def note(path: str, value: Tensor) -> Tensor:
        found.append((path, value))
        return value

    _mapped(state, name, note)
    return iter(found)


def _mapped(value: Any, path: str, function: Callable[[str, Tensor], Tensor]) -> Any:
    """Applies ``function`` to the path and value of each tensor nested in ``value``."""
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, dict):
        return {key: _mapped(each, f"{path}.{key}", function) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(e, f"{path}.{i}", function) for i, e in enumerate(value))
    return value
