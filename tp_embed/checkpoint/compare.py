"""Compares checkpoints of any formats and tensor-parallel sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contents import MASTER, WEIGHT, Checkpoint, Key
from .errors import MismatchError
from .files.arrays import CHUNK_BYTES, Array, boxes, same_bits
from .files.hashes import checked


@dataclass(frozen=True)
class Difference:
    """A difference in one tensor.

    :param largest: the largest absolute difference, if both tensors exist with the same shape.
    """

    key: Key
    what: str
    largest: float | None = None

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


def differences(
    first: Checkpoint,
    second: Checkpoint,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    weights_only: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Iterator[Difference]:
    """Yields the differences between two checkpoints: missing tensors and tied names, shapes,
    dtypes, values, step counts, and hyperparameters that both have.

    Without tolerances, values must match bit for bit, NaNs included. With tolerances, they are
    compared as :func:`torch.isclose` does, across dtypes, and two NaNs are equal.

    :param weights_only: compare weights and buffers, but no optimizer state. A Parameter that
        exists in fp32 only counts as a weight.
    :param progress: called with the number of bytes of ``first`` compared since the last call.
    """
    exact = rtol is None and atol is None
    yield from _other_names(first, second)
    if not weights_only:
        yield from _other_steps(first, second)
        yield from _other_hyperparameters(first, second)
    arrays = [
        _comparable(checkpoint, other, weights_only)
        for checkpoint, other in ((first, second), (second, first))
    ]
    with checked({**first.hashes, **second.hashes}):
        for key in dict.fromkeys([*arrays[0], *arrays[1]]):
            one, other = (each.get(key) for each in arrays)
            if one is None or other is None:
                missing = (first if one is None else second).path
                yield Difference(key, f"is missing in `{missing}`")
            elif one.shape != other.shape:
                yield Difference(key, f"has the shapes {one.shape} and {other.shape}")
            elif exact and one.dtype != other.dtype:
                yield Difference(key, f"has the dtypes {one.dtype} and {other.dtype}")
            else:
                same, largest = _compare(one, other, exact, rtol or 0.0, atol or 0.0, progress)
                if not same:
                    yield Difference(key, f"differs by up to {largest:.4g}", largest)


def check_same(
    first: Checkpoint,
    second: Checkpoint,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Checks that two checkpoints are the same, bit for bit.

    :raises MismatchError: they differ.
    """
    found = list(differences(first, second, progress=progress))
    if found:
        raise MismatchError(
            f"`{second.path}` must be the same as `{first.path}`, but differs in {len(found)} "
            f"tensors. {found[0]}."
        )


def _other_names(first: Checkpoint, second: Checkpoint) -> Iterator[Difference]:
    """Yields tied names that only one checkpoint has."""
    for one, other in ((first, second), (second, first)):
        names = {*other.names, *other.ties}
        for alias, name in one.ties.items():
            if alias not in names:
                yield Difference(
                    Key(alias), f"is another name of `{name}`, and missing in `{other.path}`"
                )


def _other_steps(first: Checkpoint, second: Checkpoint) -> Iterator[Difference]:
    """Yields step counts that both checkpoints record and that differ."""
    if None not in (first.step, second.step) and first.step != second.step:
        yield Difference(Key("checkpoint", "step"), f"is {first.step} and {second.step}")
    if first.optimizer and second.optimizer:
        others = second.optimizer.steps
        for name, step in first.optimizer.steps.items():
            if others.get(name, step) != step:
                yield Difference(Key(name, "step"), f"is {step:g} and {others[name]:g}")


def _other_hyperparameters(first: Checkpoint, second: Checkpoint) -> Iterator[Difference]:
    """Yields hyperparameters that both checkpoints record and that differ."""
    one, other = (_hyperparameters(checkpoint) for checkpoint in (first, second))
    for name in one.keys() & other.keys():
        for key in one[name].keys() & other[name].keys():
            values = [_plain(each[name][key]) for each in (one, other)]
            if values[0] != values[1]:
                yield Difference(Key(name, key), f"is {values[0]} and {values[1]}")


def _hyperparameters(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Maps each Parameter to the hyperparameters of its group."""
    groups = checkpoint.optimizer.groups if checkpoint.optimizer else ()
    return {
        name: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for name in group["params"]
    }


def _plain(value: Any) -> Any:
    """Turns tuples into lists: some formats save them so."""
    return list(value) if isinstance(value, tuple) else value


def _comparable(checkpoint: Checkpoint, other: Checkpoint, weights_only: bool) -> dict[Key, Array]:
    """Returns the tensors under keys that do not depend on the format: fp32 values without a
    weight become the weight, and tied names that the other checkpoint stores separately are
    expanded."""
    tensors = {}
    named = dict(checkpoint.tensors)
    for alias, name in checkpoint.ties.items():
        for key in other.tensors:
            if key.name == alias and Key(name, key.state) in checkpoint.tensors:
                named[key] = checkpoint.tensors[Key(name, key.state)]
    for key, array in named.items():
        if key.state == MASTER and Key(key.name) not in named:
            key = Key(key.name)
        if key.state == WEIGHT or not weights_only:
            tensors[key] = array
    return tensors


def _compare(
    one: Array,
    other: Array,
    exact: bool,
    rtol: float,
    atol: float,
    progress: Callable[[int], object],
) -> tuple[bool, float]:
    """Returns whether two arrays are the same, and their largest absolute difference."""
    same, largest = True, 0.0
    size = min(one.numel, CHUNK_BYTES // max(one.dtype.itemsize, other.dtype.itemsize))
    buffers = [torch.empty(size, dtype=array.dtype) for array in (one, other)]
    for start, shape in boxes(one.shape, max(one.dtype.itemsize, other.dtype.itemsize)):
        parts = []
        for array, buffer in zip((one, other), buffers, strict=True):
            part = buffer[: torch.Size(shape).numel()].view(shape)
            array.read(start, part)
            parts.append(part)
        if not (exact and same_bits(*parts)):
            values = [_as_numbers(part) for part in parts]
            if values[0].dtype != values[1].dtype:  # Only one is complex.
                values = [value.to(torch.complex128) for value in values]
            close = torch.isclose(values[0], values[1], rtol=rtol, atol=atol, equal_nan=True)
            same &= not exact and bool(close.all())
            gap = (values[0] - values[1]).abs().nan_to_num(float("inf"))
            gap[close & (values[0] == values[1])] = 0.0  # Infinities too.
            gap[values[0].isnan() & values[1].isnan()] = 0.0
            largest = max(largest, float(gap.max()))
        progress(parts[0].numel() * parts[0].element_size())
    return same, largest


def _as_numbers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
