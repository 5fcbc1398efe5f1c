"""Plans a conversion: selects what the target format can hold, casts it and cuts it over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import formats
from .choices import DIMS, Dim, NanPolicy
from .contents import (
    FP32_STATES,
    MASTER,
    WEIGHT,
    Checkpoint,
    Key,
    Optimizer,
    ReadOptions,
    Target,
    tables_of,
)
from .cuts import Cut, Rule, find_rule
from .errors import CheckpointError
from .files.arrays import Array, part
from .files.derived import Cast, values_of
from .formats import Format

MAX_RANKS = 65_536


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`convert`.

    :param to: the format to write.
    :param tp_size: the number of tensor-parallel ranks to write for. Default: as the source.
    :param dim: the dimension to cut vocabulary tables along. Default: as the source, else
        ``vocab``.
    :param dtype: the dtype of floating-point weights. Default: as the source. Casts the
        optimizer's master weights where they exist.
    :param vocab_size: the number of rows of vocabulary tables. Further rows of the source are
        padding and are dropped.
    :param nan: keep or refuse NaNs in weights and states.
    :param source_format: the format of the source. Default: detected.
    """

    to: str
    tp_size: int | None = None
    dim: Dim | None = None
    dtype: torch.dtype | None = None
    vocab_size: int | None = None
    max_shard_size: int = 5_000_000_000
    hf_config: Path | None = None
    zero_stage: int = 1
    dp_size: int = 1
    nan: NanPolicy = "keep"
    source_format: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class Plan:
    """A planned conversion: writes ``checkpoint`` as ``target`` says.

    :param identity: identifies the source and the request, as JSON; ``resume`` compares it.
    :param dropped: parts of the source that the format cannot hold.
    """

    request: Request
    identity: Mapping[str, Any]
    source: Checkpoint
    checkpoint: Checkpoint
    target: Target
    format: Format
    dropped: tuple[str, ...]


def plan(source: str | Path, request: Request) -> Plan:
    """Plans what :func:`convert` does. Writes nothing.

    :raises CheckpointError: the source cannot be read, or cannot be written as requested.
    """
    target_format = formats.get(request.to)
    options = replace(
        request.read,
        vocab_size=request.vocab_size,
        with_optimizer=request.read.with_optimizer and target_format.HAS_OPTIMIZER,
    )
    checkpoint = formats.read(Path(source), options, request.source_format)
    tables = tables_of(checkpoint, options.rules)
    carried, dropped = _carried(checkpoint, target_format, request)
    carried = without_padding(carried, tables, request.vocab_size)
    tp_size = request.tp_size or checkpoint.tp_size
    if not 1 <= tp_size <= MAX_RANKS:
        raise CheckpointError(f"`--tp` must be in [1, {MAX_RANKS}], but is {tp_size}.")
    if not target_format.HAS_RANKS:
        tp_size = 1
    target = Target(
        tp_size=tp_size,
        cuts=_cuts(carried, tables, options.rules, request.dim, tp_size),
        tables=tables,
        max_shard_size=request.max_shard_size,
        hf_config=request.hf_config,
        zero_stage=request.zero_stage,
        dp_size=request.dp_size,
    )
    identity = identity_of(checkpoint, request)
    return Plan(request, identity, checkpoint, carried, target, target_format, tuple(dropped))


def _carried(
    checkpoint: Checkpoint, target: Format, request: Request
) -> tuple[Checkpoint, list[str]]:
    """Returns the part of ``checkpoint`` that the format can hold, cast for it, and lists what it
    drops."""
    checkpoint, dropped = _with_cast_tables(checkpoint, target, request)
    tensors: dict[Key, Array] = {}
    buffers = set(checkpoint.buffers)
    apart = checkpoint.apart if request.read.with_optimizer else frozenset()
    for name in checkpoint.names:
        weight, master = (checkpoint.tensors.get(Key(name, state)) for state in (WEIGHT, MASTER))
        best = _either(master, weight)
        if target.MAIN == WEIGHT or name in buffers | apart or not best.dtype.is_floating_point:
            if target.MAIN == MASTER and name not in apart:
                buffers.add(name)  # The format has no other place for it.
            main = _weight(name, weight, master, request.dtype)
            tensors[Key(name)] = main
            if master is not None and target.HAS_OPTIMIZER and main is not master:
                tensors[Key(name, MASTER)] = master
        elif best.dtype.itemsize > 4 and request.dtype != torch.float32:
            raise CheckpointError(
                f"`{name}` must be in fp32 to be written as `{target.NAME}`, but is of "
                f"{best.dtype}. Pass `--dtype float32` to round it."
            )
        else:
            tensors[Key(name, MASTER)] = _cast(name, best, torch.float32)
    states = {k: a for k, a in checkpoint.tensors.items() if k.state not in (WEIGHT, MASTER)}
    optimizer = checkpoint.optimizer if request.read.with_optimizer else None
    if not request.read.with_optimizer:
        tensors = {
            key: array
            for key, array in tensors.items()
            if key.state != MASTER or Key(key.name) not in tensors
        }
        states = {}
    if not target.HAS_OPTIMIZER:
        if states or any(Key(key.name, MASTER) in checkpoint.tensors for key in tensors):
            held = {key.state for key in checkpoint.tensors} - {WEIGHT}
            dropped.append(f"the optimizer's {sorted(held)}")
        optimizer = None
    else:
        tensors |= states
        if states and optimizer is None:
            names = tuple(dict.fromkeys(key.name for key in states))
            optimizer = Optimizer(({"params": list(names)},), {})
    extra: Mapping[str, Any] = checkpoint.extra
    if not target.HAS_EXTRA and extra:
        dropped.append(f"{sorted(extra)} of the training run")
        extra = {}
    return (
        replace(
            checkpoint,
            tensors=tensors,
            buffers=frozenset(buffers),
            optimizer=optimizer,
            extra=extra,
            hashes={},
        ),
        dropped,
    )


def _with_cast_tables(
    checkpoint: Checkpoint, target: Format, request: Request
) -> tuple[Checkpoint, list[str]]:
    """Casts tables with an optimizer of their own, from their fp32 values if there are some. Lists
    what it drops."""
    tensors, dropped = dict(checkpoint.tensors), []
    for name in sorted(checkpoint.apart):
        weight = tensors[Key(name)]
        if request.dtype in (None, weight.dtype):
            continue
        master, remainder = (tensors.pop(Key(name, s), None) for s in FP32_STATES)
        tensors[Key(name)] = _cast(name, values_of(weight, master, remainder), request.dtype)
        if request.dtype != torch.float32 and target.HAS_OPTIMIZER:
            dropped.append(f"the fp32 values of `{name}`, which has another dtype now")
    return replace(checkpoint, tensors=tensors), dropped


def _weight(
    name: str, weight: Array | None, master: Array | None, dtype: torch.dtype | None
) -> Array:
    if dtype is None or (weight is not None and weight.dtype == dtype):
        return _either(weight, master)
    best = _either(master, weight)
    return _cast(name, best, dtype) if best.dtype.is_floating_point else best


def _either(first: Array | None, second: Array | None) -> Array:
    found = first if first is not None else second
    assert found is not None  # Every name has a weight or a master copy.
    return found


def _cast(name: str, array: Array, dtype: torch.dtype) -> Array:
    return array if array.dtype == dtype else Cast(name, array, dtype)


def without_padding(
    checkpoint: Checkpoint, tables: frozenset[str], vocab_size: int | None
) -> Checkpoint:
    """Drops the rows of tables beyond ``vocab_size``."""
    if vocab_size is None:
        return checkpoint
    if not tables:
        raise CheckpointError(
            "`--vocab-size` must apply to a table, but none has a usual name. Say which with "
            "`--rules PATTERN=vocab`."
        )
    tensors = dict(checkpoint.tensors)
    heads = {f"{name.removesuffix('.weight')}.bias" for name in tables} & set(checkpoint.names)
    for key, array in checkpoint.tensors.items():
        if key.name in tables | heads and array.shape[:1] not in ((), (vocab_size,)):
            if array.shape[0] < vocab_size:
                raise CheckpointError(
                    f"`--vocab-size` must be at most {array.shape[0]}, the number of rows of "
                    f"`{key.name}`, but is {vocab_size}. New rows need initial values: use "
                    "`resize_vocab()` of the DeepSpeed integration."
                )
            start = (0,) * len(array.shape)
            tensors[key] = part(array, start, (vocab_size, *array.shape[1:]))
    return replace(checkpoint, tensors=tensors)


def _cuts(
    checkpoint: Checkpoint,
    tables: frozenset[str],
    rules: tuple[Rule, ...],
    dim: Dim | None,
    tp_size: int,
) -> dict[str, Cut | None]:
    """Returns the cut of each Parameter and buffer."""
    cuts: dict[str, Cut | None] = {}
    unknown = []
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        rule = find_rule(rules, name)
        known = checkpoint.cuts.get(name)
        if name in tables and dim:
            cuts[name] = Cut.even(DIMS[dim], (shape[DIMS[dim]],), tp_size)
        elif rule is not None:
            cuts[name] = rule.cut(name, shape, tp_size)
        elif name in checkpoint.cuts:
            cuts[name] = known and _resized(known, shape[known.dim]).over(tp_size)
        elif name in tables | checkpoint.apart:
            cuts[name] = Cut.even(DIMS["vocab"], (shape[0],), tp_size)
        elif tp_size == 1 or not shape:
            cuts[name] = None
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"To write for {tp_size} tensor-parallel ranks, it must be known how each Parameter is "
            f"cut, but the source does not say it of {len(unknown)}, as `{unknown[0]}`. Say it "
            "with `--rules 'PATTERN=DIM'`, or `--rules '*=replicated'` for what every rank has "
            "whole."
        )
    return cuts


def _resized(cut: Cut, size: int) -> Cut:
    """Returns ``cut`` for ``size`` indices, without the padding it had."""
    return cut if cut.size == size else Cut.even(cut.dim, (size,), cut.num_shards)


def identity_of(source: Checkpoint, request: Request) -> dict[str, Any]:
    """Identifies a conversion, as JSON: the request, and paths, sizes and times of its files."""
    settings = sorted(request.hf_config.iterdir()) if request.hf_config else []
    files = [
        (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
        for file in (*source.files, *settings)
        for stat in [file.stat()]
    ]
    digest = hashlib.sha256(repr((files, request)).encode()).hexdigest()
    return {"source": str(source.path.resolve()), "to": request.to, "digest": digest}
