"""The shards of a tensor-parallel rank to write, and their places in its files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...contents import MASTER, Checkpoint, Key, Target
from ...errors import CheckpointError
from ...files.arrays import Array, Index, Joined, View
from ...files.derived import Cast, Copies
from .partitions import SUB_GROUP_SIZE, Flat, cut_groups, cut_shards, join_fragments, round_robin
from .trained import Trained, whole_step

# We write the layout of this version. Engines require a version.
DS_VERSION = "0.19.8"

# The names of `torch.float32` in DeepSpeed's config.
_FP32 = ("torch.float32", "fp32", "float32", "float")


def step_of(checkpoint: Checkpoint) -> int:
    """Returns the number of steps of the run."""
    if checkpoint.step is None and checkpoint.optimizer is not None:
        steps = checkpoint.optimizer.steps
        return max((whole_step(name, step) for name, step in steps.items()), default=0)
    return checkpoint.step or 0


def ds_config(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """Returns the config of the engine that wrote the source, with the target's ZeRO stage."""
    config = checkpoint.extra.get("ds_config")
    config = dict(config) if isinstance(config, Mapping) else {}
    zero = config.get("zero_optimization")
    zero = dict(zero) if isinstance(zero, Mapping) else {}
    return {**config, "zero_optimization": {**zero, "stage": target.zero_stage}}


@dataclass(frozen=True)
class Shards:
    """The shards of a tensor-parallel rank.

    :param directory: the directory of the tag.
    :param info: the ``universal_checkpoint_info``.
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
        """The flat tensors of trained shards, as the config of the source's engine cuts them. The
        loading engine must have the same ``round_robin_gradients`` and ``sub_group_size``."""
        zero = ds_config(self.checkpoint, self.target)["zero_optimization"]
        if self.stage < 3:
            sizes = self._sizes
            if zero.get("round_robin_gradients") and not self._is_bf16_optimizer:
                sizes = [dict(round_robin([*each.items()], self.dp_size)) for each in sizes]
            return cut_groups(sizes, self.dp_size)
        size = zero.get("sub_group_size")
        is_size = isinstance(size, (int, float)) and size > 0
        return cut_shards(self._sizes, self.dp_size, int(size) if is_size else SUB_GROUP_SIZE)

    @cached_property
    def mapped(self) -> list[Flat]:
        """The flat tensors as the mappings of ZeRO 1 and 2 describe them: an engine computes them
        in the order of the param group, even if the flat tensors have another."""
        return cut_groups(self._sizes, self.dp_size)

    @property
    def _is_bf16_optimizer(self) -> bool:
        """Whether an engine uses ``BF16_Optimizer``, which ignores ``round_robin_gradients``,
        instead of ZeRO's own optimizer: see ``_do_optimizer_sanity_check()`` of DeepSpeed."""
        config = ds_config(self.checkpoint, self.target)
        types = config.get("data_types")
        offload = config["zero_optimization"].get("offload_optimizer")
        return (
            self.stage == 1
            and self.trained.dtype == torch.bfloat16
            and isinstance(types, Mapping)
            and types.get("grad_accum_dtype") in _FP32
            and not (isinstance(offload, Mapping) and offload.get("device") == "cpu")
        )

    @cached_property
    def frozen(self) -> list[str]:
        """The names of Parameters that an engine does not train, including empty shards."""
        trained = {name for sizes in self._sizes for name in sizes}
        others = trained | self.checkpoint.buffers
        return [name for name in self.checkpoint.names if name not in others]

    @cached_property
    def empty(self) -> list[str]:
        """The names of trained Parameters without elements on this rank."""
        names = (name for group in self.trained.groups for name in group.names)
        return [name for name in names if not prod(self.shapes[name])]

    def part_size(self, name: str) -> int:
        """Returns the size of a data-parallel rank's part of a shard at ZeRO 3, with padding."""
        return -(-prod(self.shapes[name]) // self.dp_size)

    def main_key(self, name: str) -> Key:
        """Returns the key of the model's tensor: the weight, else fp32."""
        key = Key(name)
        return key if key in self.checkpoint.tensors else Key(name, MASTER)

    def master_key(self, name: str) -> Key:
        """Returns the key of the optimizer's copy: fp32, else the weight."""
        key = Key(name, MASTER)
        return key if key in self.checkpoint.tensors else Key(name)

    def _shape(self, name: str) -> Index:
        shape, cut = self.checkpoint.shape(name), self.target.cuts[name]
        return shape if cut is None else cut.shard_shape(shape, self.tp_rank)

    @cached_property
    def _sizes(self) -> list[dict[str, int]]:
        """The sizes of the shards in each param group, by name."""
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
    """Collects where the shards of a tensor-parallel rank are, in one or several files."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._found: dict[Key, list[Array]] = defaultdict(list)

    def add(self, key: Key, array: Array) -> None:
        self._found[key].append(array)

    def add_fragments(self, key: Key, flat: Flat, arrays: Sequence[Array]) -> None:
        """Adds a shard in flat tensors.

        :param arrays: the flat tensors that ``flat`` describes, of all data-parallel ranks.
        """
        shape = self._shards.shapes[key.name]
        self.add(key, join_fragments(arrays, flat.fragments[key.name], shape))

    def add_empty(self, key: Key) -> None:
        """Adds an empty shard, if the checkpoint has ``key`` and no shard was added."""
        if key in self._shards.checkpoint.tensors and key not in self._found:
            dtype = self._shards.checkpoint.tensors[key].dtype
            self.add(key, View(Joined((0,), dtype, []), self._shards.shapes[key.name]))

    def arrays(self) -> dict[Key, Array]:
        """Returns the shards, in the dtypes of the checkpoint."""
        return dict(self._arrays())

    def _arrays(self) -> Iterator[tuple[Key, Array]]:
        for key, found in self._found.items():
            dtype = self._shards.checkpoint.tensors[key].dtype
            same = [
                array if array.dtype == dtype else Cast(str(key), array, dtype) for array in found
            ]
            yield key, same[0] if len(same) == 1 else Copies(str(key), same)
