"""Reads the options of ``tp-embed plan`` from a DeepSpeed config with a section ``"tp_embed"``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, get_args

from tp_embed.command import CommandError, WrongUsageError

from .setup import MOMENTS, Strategy, TableOptimizer

# All keys of the section, since a misspelt one would plan for something else.
KEYS = (
    *("strategy", "rules", "tie_head", "shard_head", "fuse_loss", "shard_logits", "output"),
    *("head_input", "head_deterministic", "dedup", "sparse", "reuse_grad", "check_ids", "init"),
    *("train_rows", "placement", "tables", "watchdog"),
)


def read_engine_config(path: Path) -> dict[str, Any]:
    """Reads a DeepSpeed config.

    :raises CommandError: the file holds no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CommandError(f"`{path}` must be JSON, but is not: {e}") from e
    if not isinstance(config, dict):
        raise CommandError(f"`{path}` must hold a JSON object, but does not.")
    return config


def options_of(config: Mapping[str, Any], table: str | None) -> dict[str, Any]:
    """Returns the options that a DeepSpeed config gives, by their names in the parser.

    :param table: the name of the table in the model, for patterns of the section.
    :raises WrongUsageError: the section has another key, or patterns but there is no ``table``; or
        the planner can't plan for a value.
    """
    section = config.get("tp_embed") or {}
    if unknown := sorted(section.keys() - set(KEYS)):
        raise WrongUsageError(
            f"`tp_embed` of the config must have keys of {sorted(KEYS)}, but has {unknown}."
        )
    found = {
        "zero_stage": _get(config, "zero_optimization", "stage") or 0,
        "dtype": _dtype(config),
        "grad_dtype": _get(config, "data_types", "grad_accum_dtype"),
        "accumulation_steps": _get(config, "gradient_accumulation_steps"),
        "tp": _get(config, "tensor_parallel", "autotp_size") or None,
        "optimizer": _optimizer(config),
        "output": "sequence" if section.get("output") == "sequence" else None,
        "dedup": {True: "always", False: "never"}.get(section.get("dedup", "auto")),
        "fuse_loss": bool(section.get("fuse_loss")),
        **{key: section.get(key) for key in ("shard_head", "shard_logits", "sparse", "placement")},
        **_of_table(section, table),
        "tie_head": section.get("tie_head", True),
    }
    return {name: value for name, value in found.items() if value is not None}


def _get(config: Mapping[str, Any], *keys: str) -> Any:
    """Returns a value of the config, or ``None`` if there is none, or a trainer fills it in."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value == "auto" else value


def _dtype(config: Mapping[str, Any]) -> str:
    low = [name for name in ("bf16", "fp16") if _get(config, name, "enabled") is True]
    return low[0] if low else "fp32"


def _optimizer(config: Mapping[str, Any]) -> str | None:
    kind = _get(config, "optimizer", "type")
    if kind is None:
        return None
    name = str(kind).lower()
    if name == "sgd" and _get(config, "optimizer", "params", "momentum"):
        return "momentum"
    if name not in MOMENTS:
        raise WrongUsageError(
            f"`optimizer.type` of the config must be one of {tuple(MOMENTS)}, but is {kind!r}: "
            "give --optimizer, one with as many moments."
        )
    return name


def _of_table(section: Mapping[str, Any], table: str | None) -> dict[str, Any]:
    rules, tables = section.get("rules") or {}, section.get("tables") or {}
    patterns = list(dict.fromkeys((*rules, *tables)))
    if table is None and patterns and patterns != list(tables)[:1]:
        raise WrongUsageError(
            "--table must be the name of the table in the model, such as model.embed_tokens, since "
            f"`tp_embed` of the config has the patterns {patterns}."
        )
    name = table or next(iter(patterns), "")
    strategy = _first_match(rules, name) or section.get("strategy", "auto")
    if strategy not in (known := ("auto", *get_args(Strategy))):
        raise WrongUsageError(
            f"The strategy of {name!r} must be one of {known}, but is {strategy!r} in the config."
        )
    own = _first_match(tables, name)
    if own is None:
        return {"strategy": strategy}
    optimizer = own.get("optimizer") if isinstance(own, Mapping) else own
    if optimizer not in get_args(TableOptimizer):
        raise WrongUsageError(
            f"`tp_embed.tables` of the config must have an `optimizer` for {name!r}, one of "
            f"{get_args(TableOptimizer)}, but has {optimizer!r}."
        )
    if own.get("memory") is not None:
        raise WrongUsageError(
            f"`tp_embed.tables` of the config must have no `memory` for {name!r} to be planned, "
            "since the table is in files. Leave it out: bytes of the weight and the states of the "
            "optimizer are then the sizes of the files."
        )
    decay = bool(own.get("weight_decay"))
    return {"strategy": strategy, "table_optimizer": optimizer, "table_decay": decay}


_Value = TypeVar("_Value")


def _first_match(values: Mapping[str, _Value], name: str) -> _Value | None:
    return next((v for pattern, v in values.items() if fnmatchcase(name, pattern)), None)
