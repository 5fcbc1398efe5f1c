"""What is in a checkpoint, whatever its format: whole tensors by name, and what else was saved."""

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

# What there is of a Parameter. Optimizers other than Adam have others.
WEIGHT = "weight"  # as the model has it; buffers too
MASTER = "fp32"  # the optimizer's copy of a 16-bit weight
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


class Key(NamedTuple):
    """A tensor of a checkpoint: the name of a Parameter or buffer, and what of it."""

    name: str
    state: str = WEIGHT

    def __str__(self) -> str:
        return self.name if self.state == WEIGHT else f"{self.name} ({self.state})"


Arrays = Mapping[Key, Array]


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer has saved beside its tensors.

    :param groups: its param groups: hyperparameters, and the names of Parameters under ``params``.
    :param steps: the number of steps of each Parameter.
    """

    groups: tuple[Mapping[str, Any], ...]
    steps: Mapping[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """The whole content of a checkpoint; of its tensors, where they are.

    :param format: the name of its format.
    :param path: the file or directory.
    :param tensors: whole tensors in logical shapes. A Parameter has a ``weight``, or if the format
        keeps no other only a ``fp32`` one. A Parameter with several names is there under one.
    :param cuts: how it was cut over the tensor-parallel ranks, as far as the checkpoint or a rule
        says: ``None`` is for what every rank has whole.
    :param ties: other names of Parameters, with the name that they are in ``tensors`` by.
    :param buffers: the names that are not of Parameters.
    :param extra: what is neither of these and can be kept by some formats, as the state of a
        learning-rate schedule: plain Python values, by the names of DeepSpeed where it has one.
    :param notes: what a user should know of what was read.
    :param files: what it was read from.
    :param hashes: the SHA-256 that files of it must have, if it says so. They have not been
        compared: see :func:`~tp_embed.checkpoint.files.hashes.checked`.
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
        """The logical shape of a Parameter or buffer."""
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {key.name: array.shape for key, array in self.tensors.items()}


def tables_of(checkpoint: Checkpoint, rules: Sequence[Rule]) -> frozenset[str]:
    """The names of vocabulary tables and of their heads, which are matrices."""
    return frozenset(
        name
        for name in checkpoint.names
        if len(checkpoint.shape(name)) == 2 and is_table(rules, name)
    )


@dataclass(frozen=True)
class ReadOptions:
    """How to read a checkpoint.

    :param tag: which one of a directory with several; if ``None``, the one that ``latest`` names.
    :param rules: how its Parameters are cut, where it does not say it.
    :param cuts: the same by name, before all else: for what we have written ourselves.
    :param vocab_size: the number of rows of its tables without padding, where it does not say it.
    :param allow_unsafe_pickle: run the code that pickled files ask for.
    :param optimizer_names: the names of the Parameters of an optimizer, in its order, where the
        checkpoint does not say it.
    :param with_optimizer: whether what the optimizer has is wanted.
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
    """What to write.

    :param tp_size: over how many tensor-parallel ranks.
    :param cuts: how to cut each Parameter and buffer, for every name of the checkpoint; ``None``
        for what every rank gets whole.
    :param tables: the names of vocabulary tables and their heads.
    :param max_shard_size: how many bytes there are at most in a file of a Hugging Face directory.
    :param hf_config: a directory with ``config.json`` and the like to copy.
    :param zero_stage: of a DeepSpeed checkpoint.
    :param dp_size: over how many data-parallel ranks a DeepSpeed checkpoint is cut.
    """

    tp_size: int
    cuts: Mapping[str, Cut | None]
    tables: frozenset[str] = frozenset()
    max_shard_size: int = 5_000_000_000
    hf_config: Path | None = None
    zero_stage: int = 1
    dp_size: int = 1


class Output(NamedTuple):
    """A checkpoint whose files are laid out.

    :param arrays: where to write each tensor, whole.
    :param finish: to be called when that is done; it writes what depends on their values.
    """

    arrays: dict[Key, Array]
    finish: Callable[[], object] = lambda: None


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name as torch prints it, with or without ``torch.``.

    :raises CheckpointError: there is none.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"A dtype must be one of torch, as `bfloat16`, but is `{name}`.")
    return dtype
