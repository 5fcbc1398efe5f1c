"""The content of a checkpoint in any format: whole tensors by name, and other saved state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cuts import Cut, Rule, is_table
from .errors import CheckpointError
from .files.arrays import Array

# States of a Parameter. Optimizers other than Adam have others.
WEIGHT = "weight"  # the model's own; buffers too
MASTER = "fp32"  # the optimizer's copy of a 16-bit weight
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's

# States of the optimizers of `tp_embed.optim` that can have one value for each row of a table, and
# the one that is a number.
ROW_STATES = frozenset(("sum", "exp_avg_sq", "row_decay"))
DECAY = "decay"
# What they keep for tables in fp16, and in bf16.
FP32_STATES = ("master", "remainder")
# The entry of a param group with the class of such an optimizer.
ROW_OPTIMIZER = "row_optimizer"


class Key(NamedTuple):
    """Identifies a tensor of a checkpoint: the name of a Parameter or buffer, and its state."""

    name: str
    state: str = WEIGHT

    def __str__(self) -> str:
        return self.name if self.state == WEIGHT else f"{self.name} ({self.state})"


Arrays = Mapping[Key, Array]


@dataclass(frozen=True)
class Optimizer:
    """Saved state of an optimizer other than tensors.

    :param groups: the param groups: hyperparameters, and names of Parameters under ``params``.
    :param steps: the step count of each Parameter.
    """

    groups: tuple[Mapping[str, Any], ...]
    steps: Mapping[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint. Tensors stay in their files.

    :param format: the name of the format.
    :param path: the file or directory.
    :param tensors: whole tensors in logical shapes. A Parameter has a ``weight``, or only ``fp32``
        values if the format keeps nothing else. A tied Parameter is listed under one name.
    :param cuts: how Parameters and buffers are cut over tensor-parallel ranks, as far as the
        checkpoint or a rule says; ``None`` for replicated.
    :param ties: maps other names of tied Parameters to their names in ``tensors``.
    :param buffers: the names of buffers.
    :param extra: other state that some formats can keep, such as a learning-rate schedule: plain
        Python values, under DeepSpeed's names where it has one.
    :param notes: notes for the user about the checkpoint.
    :param files: the files it was read from.
    :param hashes: the SHA-256 recorded for files, not checked yet: see
        :func:`~tp_embed.checkpoint.files.hashes.checked`.
    """

    format: str
    path: Path
    tensors: Arrays
    tp_size: int = 1
    cuts: Mapping[str, Cut | None] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    step: int | None = None
    optimizer: Optimizer | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    hashes: Mapping[Path, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of Parameters and buffers, in the order of the checkpoint."""
        return list(dict.fromkeys(key.name for key in self.tensors))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the logical shape of a Parameter or buffer."""
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            key.name: array.shape
            for key, array in self.tensors.items()
            if key.state in (WEIGHT, MASTER)
        }

    @cached_property
    def apart(self) -> frozenset[str]:
        """The names of tables with an optimizer of :mod:`tp_embed.optim` each."""
        groups = self.optimizer.groups if self.optimizer else ()
        return frozenset(
            name for group in groups if ROW_OPTIMIZER in group for name in group["params"]
        )


def is_row_wise(key: Key, shape: Sequence[int], table: Sequence[int]) -> bool:
    """Returns whether a state of ``shape`` has one value for each row of ``table``, a shape."""
    rows = tuple(table[:1])
    is_fit = len(table) == 2 and tuple(shape) in (rows, (*rows, 1))
    return is_fit and key.state in ROW_STATES and tuple(shape) != tuple(table)


def fits(key: Key, shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Returns whether a state of a Parameter of the shape ``whole`` can have ``shape``."""
    is_number = key.state == DECAY and not shape
    return tuple(shape) == tuple(whole) or is_number or is_row_wise(key, shape, whole)


def tables_of(checkpoint: Checkpoint, rules: Sequence[Rule]) -> frozenset[str]:
    """Returns the names of vocabulary tables and their heads. Only matrices qualify."""
    return frozenset(
        name
        for name in checkpoint.names
        if len(checkpoint.shape(name)) == 2 and is_table(rules, name)
    )


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a checkpoint.

    :param tag: selects one checkpoint of a directory. Default: the one that ``latest`` names.
    :param rules: how Parameters are cut, where the checkpoint does not say.
    :param cuts: cuts by name. Override all else; for reading back our own output.
    :param vocab_size: the number of rows of tables without padding, where the checkpoint does not
        say.
    :param allow_unsafe_pickle: run the code in pickled files.
    :param optimizer_names: the names of the optimizer's Parameters, in its order, where the
        checkpoint does not say.
    :param with_optimizer: read optimizer state.
    """

    tag: str | None = None
    rules: tuple[Rule, ...] = ()
    cuts: Mapping[str, Cut | None] | None = None
    vocab_size: int | None = None
    allow_unsafe_pickle: bool = False
    optimizer_names: tuple[str, ...] | None = None
    with_optimizer: bool = True


@dataclass(frozen=True)
class Target:
    """Options for writing a checkpoint.

    :param tp_size: the number of tensor-parallel ranks.
    :param cuts: the cut of every Parameter and buffer; ``None`` for replicated.
    :param tables: the names of vocabulary tables and their heads.
    :param max_shard_size: the most bytes in one file of a Hugging Face directory.
    :param hf_config: a directory with ``config.json`` and similar files to copy.
    :param zero_stage: the ZeRO stage of a DeepSpeed checkpoint.
    :param dp_size: the number of data-parallel ranks of a DeepSpeed checkpoint.
    """

    tp_size: int
    cuts: Mapping[str, Cut | None]
    tables: frozenset[str] = frozenset()
    max_shard_size: int = 5_000_000_000
    hf_config: Path | None = None
    zero_stage: int = 1
    dp_size: int = 1


class Output(NamedTuple):
    """A checkpoint whose files are laid out and wait for values.

    :param arrays: where to write each whole tensor.
    :param finish: call it when all tensors are written; writes what depends on their values.
    """

    arrays: dict[Key, Array]
    finish: Callable[[], object] = lambda: None


def parse_dtype(name: str) -> torch.dtype:
    """Returns the dtype with a name as torch prints it, with or without ``torch.``.

    :raises CheckpointError: torch has no such dtype.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"A dtype must be one of torch, as `bfloat16`, but is `{name}`.")
    return dtype
