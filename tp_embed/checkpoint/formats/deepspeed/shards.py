"""What there is to write for a tensor-parallel rank, and where each of it is in the files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...arrays import Array, Copies, Index, Joined, Tile, View
from ...errors import CheckpointError
from ...logical import MASTER, Checkpoint, Key, Target
from .partitions import SUB_GROUP_SIZE, Flat, cut_groups, cut_shards
from .trained import Trained, whole_step

# The layout is that of this version, and engines want to know it.
DS_VERSION = "0.19.8"


def step_of(checkpoint: Checkpoint) -> int:
    """How many steps the run has made."""
    if checkpoint.step is None and checkpoint.optimizer is not None:
        steps = checkpoint.optimizer.steps
        return max((whole_step(name, step) for name, step in steps.items()), default=0)
    return checkpoint.step or 0


def ds_config(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """The config of the engine that wrote the source, at the stage that is written."""
    config = checkpoint.extra.get("ds_config")
    config = dict(config) if isinstance(config, Mapping) else {}
    zero = config.get("zero_optimization")
    zero = dict(zero) if isinstance(zero, Mapping) else {}
    return {**config, "zero_optimization": {**zero, "stage": target.zero_stage}}


@dataclass(frozen=True)
class Shards:
    """The shards of a tensor-parallel rank.

    :param directory: of the tag.
    :param info: how all of the checkpoint is cut, for universal checkpoints.
    """

    checkpoint: Checkpoint
    target: Target
    trained: Trained
    directory: Path
    info: dict[str, Any]
    tp_rank: int

    @property
    def stage(self) -> int:
        return self.target.zero_stage

    @property
    def dp_size(self) -> int:
        return self.target.dp_size

    @cached_property
    def shapes(self) -> dict[str, Index]:
        return {name: self._shape(name) for name in self.checkpoint.names}

    @cached_property
    def flats(self) -> list[Flat]:
        """How the shards that are trained are cut over data-parallel ranks."""
        if self.stage < 3:
            return cut_groups(self._sizes, self.dp_size)
        size = ds_config(self.checkpoint, self.target)["zero_optimization"].get("sub_group_size")
        is_size = isinstance(size, (int, float)) and size > 0
        return cut_shards(self._sizes, self.dp_size, int(size) if is_size else SUB_GROUP_SIZE)

    @cached_property
    def frozen(self) -> list[str]:
        """What an engine does not train: an empty shard too."""
        trained = {name for sizes in self._sizes for name in sizes}
        others = trained | self.checkpoint.buffers
        return [name for name in self.checkpoint.names if name not in others]

    @cached_property
    def empty(self) -> list[str]:
        """The names of what is trained, but not here."""
        names = (name for group in self.trained.groups for name in group.names)
        return [name for name in names if not prod(self.shapes[name])]

    def part_size(self, name: str) -> int:
        """How many elements of a shard a data-parallel rank has at ZeRO 3, padding included."""
        return -(-prod(self.shapes[name]) // self.dp_size)

    def main_key(self, name: str) -> Key:
        """Of what the tensor of the model is."""
        key = Key(name)
        return key if key in self.checkpoint.tensors else Key(name, MASTER)

    def master_key(self, name: str) -> Key:
        """Of what the optimizer's copy is."""
        key = Key(name, MASTER)
        return key if key in self.checkpoint.tensors else Key(name)

    def _shape(self, name: str) -> Index:
        shape, cut = self.checkpoint.shape(name), self.target.cuts[name]
        return shape if cut is None else cut.shard_shape(shape, self.tp_rank)

    @cached_property
    def _sizes(self) -> list[dict[str, int]]:
        """How large the shards of each param group are, by name."""
        sizes = [
            {name: prod(self.shapes[name]) for name in group.names if prod(self.shapes[name])}
            for group in self.trained.groups
        ]
        if self.stage and not all(sizes):
            raise CheckpointError(
                f"Tensor-parallel rank {self.tp_rank} must have elements of param group "
                f"{sizes.index({})}, but has only empty shards of it. Write for fewer ranks, or "
                "for ZeRO 0."
            )
        return sizes


class Places:
    """Where the shards of a tensor-parallel rank are, in one file or in several."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._found: dict[Key, list[Array]] = defaultdict(list)

    def add(self, key: Key, array: Array) -> None:
        self._found[key].append(array)

    def add_fragments(self, key: Key, flat: Flat, arrays: Sequence[Array]) -> None:
        """:param arrays: the flat tensors that ``flat`` is about, of all data-parallel ranks."""
        tiles, begin = [], 0
        for fragment in flat.fragments[key.name]:
            array = arrays[fragment.dp_rank]
            tiles.append(Tile((begin,), array, (fragment.start,), (fragment.size,)))
            begin += fragment.size
        self._add_joined(key, arrays[0].dtype, tiles)

    def add_empty(self, key: Key) -> None:
        """Notes that there is nothing of ``key`` here, if there is of others."""
        if key in self._shards.checkpoint.tensors and key not in self._found:
            self._add_joined(key, self._shards.checkpoint.tensors[key].dtype, [])

    def arrays(self) -> dict[Key, Array]:
        """The shards, in the dtypes of the checkpoint."""
        return dict(self._arrays())

    def _add_joined(self, key: Key, dtype: torch.dtype, tiles: Sequence[Tile]) -> None:
        shape = self._shards.shapes[key.name]
        self.add(key, View(Joined((prod(shape),), dtype, tiles), shape))

    def _arrays(self) -> Iterator[tuple[Key, Array]]:
        for key, found in self._found.items():
            dtype = self._shards.checkpoint.tensors[key].dtype
            same = [array if array.dtype == dtype else _Widened(array, dtype) for array in found]
            yield key, same[0] if len(same) == 1 else Copies(str(key), same)


class _Widened(Array):
    """``array`` for values of a narrower dtype, as of 16-bit weights that are kept in fp32."""

    def __init__(self, array: Array, dtype: torch.dtype) -> None:
        super().__init__(array.shape, dtype)
        self._array = array

    def read(self, start: Index, out: Tensor) -> None:
        values = torch.empty(out.shape, dtype=self._array.dtype)
        self._array.read(start, values)
        out.copy_(values)

    def write(self, start: Index, values: Tensor) -> None:
        self._array.write(start, values.to(self._array.dtype))
