"""Describes checkpoints as data for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .contents import MASTER, WEIGHT, Checkpoint, tables_of
from .conversion import Plan
from .cuts import Cut, Rule
from .files.arrays import Array


def describe(checkpoint: Checkpoint, rules: tuple[Rule, ...] = ()) -> dict[str, Any]:
    """Returns the report of ``tp-embed inspect``."""
    tables = tables_of(checkpoint, rules) | checkpoint.apart
    optimizer = checkpoint.optimizer
    return {
        "format": checkpoint.format,
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "tp_size": checkpoint.tp_size,
        "bytes": checkpoint.nbytes,
        "tensors": _tensors(checkpoint, checkpoint.cuts, checkpoint.tp_size, tables),
        "ties": dict(checkpoint.ties),
        "optimizer": None if optimizer is None else {"param_groups": len(optimizer.groups)},
        "extra": sorted(map(str, checkpoint.extra)),
        "notes": list(checkpoint.notes),
    }


def describe_plan(work: Plan) -> dict[str, Any]:
    """Describes what a conversion writes."""
    checkpoint, target = work.checkpoint, work.target
    tables = target.tables | checkpoint.apart
    return {
        "source": str(work.source.path),
        "source_format": work.source.format,
        "format": work.format.NAME,
        "step": checkpoint.step,
        "tp_size": target.tp_size,
        "bytes": checkpoint.nbytes,
        "tensors": _tensors(checkpoint, target.cuts, target.tp_size, tables),
        "ties": dict(checkpoint.ties),
        "dropped": list(work.dropped),
        "notes": list(work.source.notes),
    }


def _tensors(
    checkpoint: Checkpoint,
    cuts: Mapping[str, Cut | None],
    tp_size: int,
    tables: frozenset[str],
) -> list[dict[str, Any]]:
    """Describes each Parameter and buffer, cut over ``tp_size`` ranks."""
    states: dict[str, dict[str, Array]] = {}
    for key, array in checkpoint.tensors.items():
        states.setdefault(key.name, {})[key.state] = array
    described = []
    for name, arrays in states.items():
        main = arrays.get(WEIGHT) or arrays.get(MASTER) or next(iter(arrays.values()))
        cut = cuts.get(name)
        described.append(
            {
                "name": name,
                "kind": _kind(name, checkpoint, tables),
                "shape": list(main.shape),
                "dtype": _dtype(main),
                "layout": _layout(name, cuts, tp_size),
                "cut": None if cut is None else cut.to_json(),
                "states": {state: _dtype(array) for state, array in arrays.items()},
                "bytes": sum(array.nbytes for array in arrays.values()),
            }
        )
    return described


def _kind(name: str, checkpoint: Checkpoint, tables: frozenset[str]) -> str:
    if name in checkpoint.buffers:
        return "buffer"
    return "table" if name in tables else "parameter"


def _layout(name: str, cuts: Mapping[str, Cut | None], tp_size: int) -> str:
    if tp_size == 1:
        return "whole"
    if name not in cuts:
        return "unknown"
    return "replicated" if cuts[name] is None else "sharded"


def _dtype(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")
