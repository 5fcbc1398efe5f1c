"""Reads and writes the manifest of our own format, which ``docs/manifest.md`` describes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from ...contents import (
    MASTER,
    WEIGHT,
    Checkpoint,
    Key,
    Optimizer,
    Target,
    fits,
    parse_dtype,
)
from ...cuts import Cut, join
from ...errors import CheckpointError
from ...files.arrays import Array, Index
from ...files.plain_values import damaged, from_json, to_json

FORMAT = "tp-embed"
VERSION = 2

_KEYS = {"format", "version", "tp_size", "step", "tensors", "ties", "optimizer", "extra"}

# Limit for the number of elements, so that torch can compute with it.
_MAX_SIZE = 2**60


@dataclass(frozen=True)
class Entry:
    """The manifest's entry for a Parameter or buffer.

    :param is_known: the cut is known. With one rank it can be unknown.
    :param dtypes: the dtype of each state.
    :param shapes: the shapes of states that differ from ``shape``: one value for each row, or one
        number.
    """

    shape: Index
    is_buffer: bool
    cut: Cut | None
    is_known: bool
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, Index] = field(default_factory=dict)

    def cut_of(self, state: str) -> Cut | None:
        """Returns how a state is cut. With a cut along the columns, each rank has all rows."""
        is_whole = state in self.shapes and (self.cut is None or self.cut.dim > 0)
        return None if is_whole or self.shapes.get(state) == () else self.cut

    def shard_shape(self, state: str, rank: int) -> Index:
        shape, cut = self.shapes.get(state, self.shape), self.cut_of(state)
        return shape if cut is None else cut.shard_shape(shape, rank)

    def to_json(self) -> dict[str, Any]:
        whole = "replicated" if self.is_known else None
        shapes = {state: list(shape) for state, shape in self.shapes.items()}
        return {
            "shape": list(self.shape),
            "dtypes": {state: str(d).removeprefix("torch.") for state, d in self.dtypes.items()},
            "buffer": self.is_buffer,
            "partition": whole if self.cut is None else self.cut.to_json(),
            **({"shapes": shapes} if shapes else {}),
        }

    @classmethod
    def from_json(cls, what: str, value: Any, tp_size: int) -> Self:
        match value:
            case {"shape": shape, "dtypes": dict(dtypes), "buffer": bool(is_buffer), **rest}:
                pass
            case _:
                raise damaged(what, "an object with a shape, dtypes and so on", value)
        _check_keys(what, value, {"shape", "dtypes", "buffer", "partition"}, {"shapes"})
        if not (WEIGHT in dtypes or MASTER in dtypes) or any("/" in state for state in dtypes):
            raise damaged(f"dtypes of {what}", "given for its `weight` or `fp32`", dtypes)
        partition, whole = rest["partition"], _shape(what, shape)
        shapes = _shapes(what, rest.get("shapes", {}), dtypes, whole)
        is_whole = partition == "replicated" or (partition is None and tp_size == 1)
        return cls(
            whole,
            is_buffer,
            None if is_whole else _cut(what, partition, whole, tp_size),
            partition is not None,
            {state: parse_dtype(str(dtype)) for state, dtype in dtypes.items()},
            shapes,
        )


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest, without the files."""

    tp_size: int
    step: int | None
    entries: Mapping[str, Entry]
    ties: Mapping[str, str]
    optimizer: Optimizer | None
    extra: Mapping[str, Any]

    def layout(self, rank: int) -> dict[str, tuple[Index, torch.dtype]]:
        """Returns the shapes and dtypes of a rank's tensors by key. Sorts larger elements first, as
        the package ``safetensors`` does, so that each tensor is aligned to its element size."""
        layout = {
            _file_key(name, state): (entry.shard_shape(state, rank), dtype)
            for name, entry in self.entries.items()
            for state, dtype in entry.dtypes.items()
        }
        return dict(sorted(layout.items(), key=lambda item: -item[1][1].itemsize))

    def join(self, ranks: Sequence[Mapping[str, Array]]) -> dict[Key, Array]:
        """Joins the arrays of the ranks' files to whole tensors."""
        return {
            key: join(str(key), entry.cut_of(key.state), [arrays[in_file] for arrays in ranks])
            for name, entry in self.entries.items()
            for key in (Key(name, state) for state in entry.dtypes)
            for in_file in [_file_key(*key)]
        }

    @classmethod
    def from_json(cls, what: str, value: Mapping[str, Any]) -> Self:
        """Parses a manifest.

        :raises CheckpointError: ``value`` is no valid manifest of this version.
        """
        version, tp_size = value.get("version"), value.get("tp_size")
        if value.get("format") != FORMAT or type(version) is not int or version < 1:
            raise damaged(what, f"of the format `{FORMAT}`, with a version", value)
        if version > VERSION:
            raise CheckpointError(
                f"{what} must have version {VERSION} of the format or older, but has {version} "
                "instead. Update tp_embed."
            )
        _check_keys(what, value, _KEYS, {"files"})
        tensors, ties, step = value["tensors"], value["ties"], value["step"]
        if type(tp_size) is not int or tp_size < 1:
            raise damaged(f"`tp_size` in {what}", "a number of ranks", tp_size)
        if not (step is None or type(step) is int):
            raise damaged(f"`step` in {what}", "a number or null", step)
        if not isinstance(tensors, dict):
            raise damaged(f"`tensors` in {what}", "an object", tensors)
        entries = {
            name: Entry.from_json(f"`{name}` in {what}", entry, tp_size)
            for name, entry in tensors.items()
        }
        for name in entries:
            if not name or name.startswith(".") or name == "__metadata__":
                raise damaged(f"a name in {what}", "one without a dot at its beginning", name)
        if not isinstance(ties, dict) or not all(
            isinstance(name, str) and name in entries and alias not in entries
            for alias, name in ties.items()
        ):
            raise damaged(f"`ties` in {what}", "other names of tensors in `tensors`", ties)
        optimizer = _optimizer(f"`optimizer` in {what}", value["optimizer"], entries.keys())
        extra = from_json(f"`extra` in {what}", value["extra"])
        if not isinstance(extra, dict):
            raise damaged(f"`extra` in {what}", "an object", extra)
        return cls(tp_size, step, entries, ties, optimizer, extra)


def manifest_json(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """Builds the manifest, without the files."""
    states: dict[str, dict[str, Array]] = {}
    for key, array in checkpoint.tensors.items():
        states.setdefault(key.name, {})[key.state] = array
    tensors = {}
    for name, arrays in states.items():
        shape, cut = checkpoint.shape(name), target.cuts[name]
        # With one rank everything is whole, even if the source does not say how to cut it.
        is_known = cut is not None or target.tp_size > 1 or name in checkpoint.cuts or not shape
        tensors[name] = Entry(
            shape,
            name in checkpoint.buffers,
            cut,
            is_known,
            {state: array.dtype for state, array in arrays.items()},
            {state: array.shape for state, array in arrays.items() if array.shape != shape},
        ).to_json()
    optimizer = None
    if checkpoint.optimizer is not None:
        groups = [
            {**group, "params": list(group["params"])} for group in checkpoint.optimizer.groups
        ]
        optimizer = {
            "groups": [to_json("a param group", group) for group in groups],
            "steps": dict(checkpoint.optimizer.steps),
        }
    return {
        "format": FORMAT,
        # Without `shapes`, older versions can read it.
        "version": VERSION if any("shapes" in entry for entry in tensors.values()) else 1,
        "tp_size": target.tp_size,
        "step": checkpoint.step,
        "tensors": tensors,
        "ties": dict(checkpoint.ties),
        "optimizer": optimizer,
        "extra": to_json("extra", dict(checkpoint.extra)),
    }


def _file_key(name: str, state: str) -> str:
    return name if state == WEIGHT else f".{state}/{name}"


def _optimizer(what: str, value: Any, names: Set[str]) -> Optimizer | None:
    """Parses the optimizer. Checks that its names are in ``names``, each in one group."""
    match value:
        case None:
            return None
        case {"groups": list(), "steps": dict(steps), **rest} if not rest:
            groups = [from_json(what, group) for group in value["groups"]]
        case _:
            raise damaged(what, "null, or an object with groups and steps", value)
    held: list[Any] = []
    for group in groups:
        match group:
            case {"params": list(params)}:
                held += params
            case _:
                raise damaged(f"a group of {what}", "an object with `params`", group)
    if not all(type(name) is str for name in held) or len(set(held)) != len(held):
        raise damaged(f"the `params` of {what}", "names, each in one group", held)
    if unknown := {*held, *steps} - names:
        raise damaged(f"the names of {what}", "names of Parameters", sorted(unknown))
    for name, step in steps.items():
        if type(step) not in (int, float) or not math.isfinite(step):
            raise damaged(f"the step of `{name}` in {what}", "a number", step)
    return Optimizer(tuple(groups), steps)


def _cut(what: str, value: Any, shape: Index, tp_size: int) -> Cut:
    """Parses a partition. Checks that it holds each index once."""
    match value:
        case {"dim": int(dim), "ranges": list(ranks)} if 0 <= dim < len(shape):
            _check_keys(f"the partition of {what}", value, {"dim", "ranges"})
        case _:
            raise damaged(
                f"the partition of {what}", 'a dimension and ranges, or "replicated"', value
            )
    parts = [part for rank in ranks if type(rank) is list for part in rank]
    if (
        type(dim) is not int
        or len(ranks) != tp_size
        or not all(type(rank) is list for rank in ranks)
        or not all(type(part) is list and [type(i) for i in part] == [int, int] for part in parts)
        or not all(0 <= start <= stop <= shape[dim] for start, stop in parts)
    ):
        raise damaged(f"the partition of {what}", f"ranges [start, stop] of {tp_size} ranks", value)
    end = 0
    for start, stop in sorted(part for part in parts if part[0] < part[1]):
        if start != end:
            break
        end = stop
    else:
        start = shape[dim]
    if start != end:
        raise damaged(
            f"the partition of {what}", f"ranges with each index below {shape[dim]} once", value
        )
    return Cut(dim, tuple(tuple(range(*part) for part in rank) for rank in ranks))


def _shape(what: str, value: Any) -> Index:
    if (
        not isinstance(value, list)
        or not all(type(size) is int and size >= 0 for size in value)
        or math.prod(max(1, size) for size in value) >= _MAX_SIZE
    ):
        raise damaged(f"the shape of {what}", "a list of sizes", value)
    return tuple(value)


def _shapes(what: str, value: Any, dtypes: Any, whole: Index) -> dict[str, Index]:
    """Parses the shapes of states that are not of the shape of the table."""
    if not isinstance(value, dict):
        raise damaged(f"`shapes` of {what}", "an object", value)
    shapes = {state: _shape(f"`{state}` of {what}", shape) for state, shape in value.items()}
    for state, shape in shapes.items():
        if state not in dtypes or not fits(Key("", state), shape, whole):
            raise damaged(f"`shapes` of {what}", "for states by row, or numbers", value)
    return shapes


def _check_keys(
    what: str,
    value: Mapping[str, Any],
    keys: set[str],
    optional: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Refuses unknown keys, which could change the meaning of others. New keys need a new
    version."""
    if not keys <= value.keys() <= keys | optional:
        raise damaged(what, f"an object with the keys {sorted(keys)}", sorted(value))


def text_of(value: Any, depth: int = 2) -> str:
    """Formats JSON with one line per tensor and file."""
    if not depth or not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    indent = "  " * (2 - depth)
    items = (
        f"{indent}  {json.dumps(key)}: {text_of(item, depth - 1)}" for key, item in value.items()
    )
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"
