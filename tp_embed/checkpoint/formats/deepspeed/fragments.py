"""Reads the shards of a tensor-parallel rank from the flat tensors of its data-parallel ranks.

ZeRO 1 and 2 (``stage_1_and_2.py`` and ``bf16_optimizer.py`` of DeepSpeed) save for each param group
a partition of one flat tensor, and the positions of Parameters in it. ZeRO 3 (``stage3.py``) saves
for each sub-group the concatenated parts of its Parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import ceil, prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ...contents import MASTER, Key
from ...errors import CheckpointError
from ...files.arrays import Array, Index
from ...files.torch_file import TorchFile
from .files import ModelFile, array_of, expect, scalars
from .partitions import Fragment, cut_groups, cut_shards, join_fragments


@dataclass
class Optimizers:
    """The content of a tensor-parallel rank's optimizers.

    :param shards: the rank's shards, by Parameter and state.
    :param groups: the hyperparameters of the param groups of torch's optimizer, with the names of
        their Parameters.
    :param scalars: the saved :data:`~.files.SCALARS`.
    """

    shards: dict[Key, Array] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    groups: list[tuple[Mapping[str, Any], list[str]]] = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_group(self, file: TorchFile, group: Mapping[str, Any], names: list[str]) -> None:
        kept, notes = file.hyperparameters(group)
        self.groups.append((kept, names))
        self.notes += notes


@dataclass(frozen=True)
class _Flat:
    """A rank's flat tensors of a group, by state, and their step count."""

    arrays: Mapping[str, Array]
    step: float | None


def read_optimizers(model: ModelFile, files: Sequence[TorchFile]) -> Optimizers:
    """Reads the optimizer files of a tensor-parallel rank, one per data-parallel rank.

    :raises CheckpointError: files are missing, from different steps, or do not match.
    """
    states = [
        expect(file.root.get("optimizer_state_dict"), dict, "`optimizer_state_dict`", file.path)
        for file in files
    ]
    first, path = states[0], files[0].path
    is_zero3 = "fp32_flat_groups" in first
    for state, file in zip(states, files, strict=True):
        _check_count(state, len(files), file.path)
        if ("fp32_flat_groups" in state) != is_zero3:
            raise CheckpointError(
                f"`{file.path}` and `{path}` must be from one ZeRO stage, but are not."
            )
    shapes = model.shapes or []
    flats = [
        _flats(file, state, is_zero3, len(shapes))
        for file, state in zip(files, states, strict=True)
    ]
    if is_zero3:
        fragments = [_parts(group, len(files)) for group in shapes]
    else:
        mappings = [
            _mappings(state, len(shapes), file.path)
            for state, file in zip(states, files, strict=True)
        ]
        fragments = [
            _mapped(group, [mapping[index] for mapping in mappings], path)
            for index, group in enumerate(shapes)
        ]
    found = Optimizers()
    found.scalars, found.notes = scalars(files[0], first)
    for index, group in enumerate(shapes):
        own = [flat[index] for flat in flats]
        step = _check_same_states(own, files)
        if is_zero3:
            _check_sizes(own, group, files)
        for name, shape in group.items():
            for kind in own[0].arrays:
                arrays = [flat.arrays[kind] for flat in own]
                key = Key(name, kind)
                found.shards[key] = _shard(str(key), arrays, fragments[index][name], shape)
            if step is not None:
                found.steps[name] = step
    orders = [list(group) for group in shapes]
    if not is_zero3:
        # The mappings have the order of the param group, even if the flat tensors do not.
        orders = [
            list(dict.fromkeys([*chain(*(mapping[index] for mapping in mappings)), *group]))
            for index, group in enumerate(shapes)
        ]
    for values, names in _groups(_base(first, is_zero3, path), orders, is_zero3, path):
        found.add_group(files[0], values, names)
    return found


def _check_count(state: Mapping[str, Any], dp_size: int, path: Path) -> None:
    count = state.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    if any(isinstance(each, int) and each != dp_size for each in counts):
        raise CheckpointError(
            f"`{path}` must have files of {counts[0]} data-parallel ranks next to it, as its "
            f"`partition_count` says, but has files of {dp_size}. Copy all files of one "
            "checkpoint, and no others."
        )


def _base(state: Mapping[str, Any], is_zero3: bool, path: Path) -> Mapping[str, Any]:
    """Returns the state dict of torch's optimizer."""
    base = state.get("optimizer_state_dict" if is_zero3 else "base_optimizer_state")
    if isinstance(base, list):
        raise CheckpointError(
            f"`{path}` must hold the state dict of an optimizer, but is an elastic checkpoint, "
            "which lacks param groups. Save it with `elastic_checkpoint` off."
        )
    return expect(base, dict, "The state of the optimizer", path)


def _flats(file: TorchFile, state: Mapping[str, Any], is_zero3: bool, count: int) -> list[_Flat]:
    path = file.path
    key = "fp32_flat_groups" if is_zero3 else "single_partition_of_fp32_groups"
    masters = expect(state.get(key), list, f"`{key}`", path)
    if len(masters) != count:
        raise CheckpointError(
            f"`{path}` must have {count} flat tensors, as the model's file says, but has "
            f"{len(masters)}. They are from different checkpoints: copy all files of one."
        )
    saved = expect(_base(state, is_zero3, path).get("state"), dict, "The optimizer's state", path)
    flats = []
    for index, master in enumerate(masters):
        arrays, step = {MASTER: _flat(file, master, MASTER)}, None
        for name, value in expect(saved.get(index, {}), dict, "A state", path).items():
            if name == "step":
                step = file.number("A `step`", value)
            elif isinstance(value, Tensor) and value.dim():
                arrays[expect(name, str, "The name of a state", path)] = _flat(file, value, name)
        flats.append(_Flat(arrays, step))
    return flats


def _flat(file: TorchFile, tensor: Any, what: str) -> Array:
    array = array_of(file, tensor, f"A flat tensor `{what}`")
    if len(array.shape) != 1:
        raise CheckpointError(
            f"A flat tensor `{what}` in `{file.path}` must have one dimension, but has the shape "
            f"{array.shape}. Only states with one value per element can be converted."
        )
    return array


def _check_same_states(flats: Sequence[_Flat], files: Sequence[TorchFile]) -> float | None:
    """Returns the step count of a group. Checks that states and step are the same on all ranks."""
    for flat, file in zip(flats, files, strict=True):
        if flat.step != flats[0].step or flat.arrays.keys() != flats[0].arrays.keys():
            raise CheckpointError(
                f"`{file.path}` and `{files[0].path}` must be from one step, but are from "
                f"{flat.step} with {sorted(flat.arrays)} and from {flats[0].step} with "
                f"{sorted(flats[0].arrays)}. Copy all files of one checkpoint."
            )
    return flats[0].step


def _check_sizes(
    flats: Sequence[_Flat], shapes: Mapping[str, Index], files: Sequence[TorchFile]
) -> None:
    """Checks that the flat tensors of ZeRO 3 have the size that ``shapes`` need."""
    size = sum(ceil(prod(shape) / len(files)) for shape in shapes.values())
    for flat, file in zip(flats, files, strict=True):
        for state, array in flat.arrays.items():
            if array.shape != (size,):
                raise CheckpointError(
                    f"A flat tensor `{state}` in `{file.path}` must have {size} elements, for "
                    f"{len(shapes)} Parameters on {len(files)} data-parallel ranks, but has "
                    f"{array.numel}. MiCS and hierarchical partitions are not supported: save the "
                    "checkpoint without them, or copy all files of one."
                )


def _mappings(state: Mapping[str, Any], count: int, path: Path) -> list[dict[str, Any]]:
    mappings = expect(state.get("param_slice_mappings"), list, "`param_slice_mappings`", path)
    if len(mappings) != count:
        raise CheckpointError(
            f"`param_slice_mappings` in `{path}` must be for {count} groups, as the model's file "
            f"says, but is for {len(mappings)}. Copy all files of one checkpoint."
        )
    return [expect(mapping, dict, "A slice mapping", path) for mapping in mappings]


def _mapped(
    shapes: Mapping[str, Index], mappings: Sequence[Mapping[str, Any]], path: Path
) -> dict[str, Sequence[Fragment]]:
    """Returns the fragments of each Parameter at ZeRO 1 and 2."""
    found: dict[str, list[Fragment]] = {name: [] for name in shapes}
    for rank, mapping in enumerate(mappings):
        for name, address in mapping.items():
            start, size = (getattr(address, key, None) for key in ("start", "numel"))
            if name not in found or type(start) is not int or type(size) is not int or size < 0:
                raise CheckpointError(
                    f"The slice mapping of data-parallel rank {rank} next to `{path}` must say "
                    f"where Parameters of the model are, but has `{str(name)[:80]}` at {start}, of "
                    f"{size} elements. Copy all files of one checkpoint."
                )
            found[name].append(Fragment(rank, start, size))
    sizes = {name: prod(shape) for name, shape in shapes.items() if prod(shape)}
    if any(sum(part.size for part in found[name]) != size for name, size in sizes.items()):
        return dict(found)  # Joining them raises.
    order = sorted(sizes, key=lambda name: found[name][0])
    if order == list(sizes):
        return dict(found)
    # With `round_robin_gradients`, the model's file has the order of the flat tensors, but the
    # mappings are computed in the order of the param group, so their positions are wrong.
    said, flat = (
        cut_groups([{name: sizes[name] for name in names}], len(mappings))[0].fragments
        for names in (order, sizes)
    )
    if any(said[name] != tuple(found[name]) for name in sizes):
        raise CheckpointError(
            f"The slice mappings next to `{path}` must have the Parameters of a group in the order "
            f"of the model's file, {list(sizes)[:3]}, or one without gaps, but have {order[:3]}. "
            "Copy all files of one checkpoint."
        )
    return {name: flat.get(name, ()) for name in shapes}


def _parts(shapes: Mapping[str, Index], dp_size: int) -> dict[str, Sequence[Fragment]]:
    """Returns the fragments of each Parameter at ZeRO 3."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    flats = cut_shards([sizes], dp_size, sub_group_size=1 + sum(sizes.values()) + len(sizes))
    return {name: own for flat in flats for name, own in flat.fragments.items()}


def frozen_shard(models: Sequence[ModelFile], name: str) -> Array:
    """Assembles the shard of a frozen Parameter at ZeRO 3, from equal parts in the model files of
    the data-parallel ranks.

    :raises CheckpointError: parts are missing, or do not fit the shape.
    """
    parts = []
    for model in models:
        held = model.state.get("frozen_param_fragments")
        fragments = expect(held, dict, "`frozen_param_fragments`", model.file.path)
        parts.append(_flat(model.file, fragments.get(name), name))
    shape = models[0].shape(name)
    return _shard(name, parts, _parts({name: shape}, len(parts))[name], shape)


def _shard(
    what: str, arrays: Sequence[Array], fragments: Sequence[Fragment], shape: Index
) -> Array:
    size = sum(fragment.size for fragment in fragments)
    if size != prod(shape):
        raise CheckpointError(
            f"The fragments of `{what}` must have {prod(shape)} elements, for its shape {shape}, "
            f"but have {size}. Copy all files of one checkpoint."
        )
    return join_fragments(arrays, fragments, shape)


def _groups(
    base: Mapping[str, Any], orders: Sequence[Sequence[str]], is_zero3: bool, path: Path
) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
    """Yields the param groups of torch's optimizer with the names of their Parameters. A group
    consists of its sub-groups at ZeRO 3, else of one flat tensor."""
    groups = expect(base.get("param_groups"), list, "`param_groups`", path)
    for index, group in enumerate(groups):
        indices = expect(group, dict, "A param group", path).get("params") if is_zero3 else [index]
        if not isinstance(indices, list) or not all(
            type(i) is int and i in range(len(orders)) for i in indices
        ):
            raise CheckpointError(
                f"The param groups in `{path}` must have {len(orders)} flat tensors, as the "
                f"model's file says, but one has {str(indices)[:80]}. Copy all files of one "
                "checkpoint."
            )
        yield group, [name for i in indices for name in orders[i]]
