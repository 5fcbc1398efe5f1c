"""Joins and splits tensors for formats with one file per tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..contents import WEIGHT, Checkpoint, Key, ReadOptions, Target
from ..cuts import Cut, find_rule, join, whole_shape
from ..errors import CheckpointError
from ..files.arrays import Array, Index
from ..files.torch_file import TorchFile, placeholder

# Maps names to each rank's array, in the order of the ranks.
Shards = Mapping[str, Sequence[Array]]


def transpose(
    ranks: Sequence[Mapping[str, Array]], files: Sequence[Path]
) -> dict[str, list[Array]]:
    """Turns a mapping per rank into one mapping from names to each rank's array.

    :raises CheckpointError: ranks differ in names, or in dtypes or numbers of dimensions.
    """
    for rank, file in zip(ranks, files, strict=True):
        if rank.keys() != ranks[0].keys():
            odd = sorted(rank.keys() ^ ranks[0].keys())
            raise CheckpointError(
                f"`{file}` must hold the same names as `{files[0]}`, but {len(odd)} are in one of "
                f"them only, such as `{odd[0]}`. All files must be from one checkpoint."
            )
    shards = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    for name, arrays in shards.items():
        if len({(array.dtype, len(array.shape)) for array in arrays}) > 1:
            raise CheckpointError(
                f"`{name}` must be of one dtype and number of dimensions on every rank, but is "
                f"{arrays}. All files must be from one checkpoint."
            )
    return shards


def join_ranks(
    shards: Shards, options: ReadOptions, known: Mapping[str, Cut | None]
) -> tuple[dict[Key, Array], dict[str, Cut | None]]:
    """Joins the ranks' shards to whole tensors. Returns them and their cuts.

    :param known: the cuts that the checkpoint records.
    :raises CheckpointError: a cut is unknown, or does not fit the shapes.
    """
    cuts: dict[str, Cut | None] = {}
    unknown = []
    for name, arrays in shards.items():
        rule = find_rule(options.rules, name)
        if options.cuts is not None and name in options.cuts:
            cuts[name] = options.cuts[name]
        elif name in known:
            cuts[name] = known[name]
        elif rule is not None:
            shape = arrays[0].shape if rule.dim is None else whole_shape(name, rule.dim, arrays)
            cuts[name] = rule.cut(name, shape, len(arrays))
        elif len(arrays) > 1 and not arrays[0].shape:
            cuts[name] = None
        elif len(arrays) > 1:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            "It must be known how each Parameter is cut over the tensor-parallel ranks, but the "
            f"checkpoint does not say it of {len(unknown)}, as `{unknown[0]}`. Say it with "
            "`--rules 'PATTERN=DIM'`, or `--rules '*=replicated'` for what every rank has whole."
        )
    tensors = {Key(name): join(name, cuts.get(name), arrays) for name, arrays in shards.items()}
    return tensors, cuts


def check_even(name: str, cut: Cut, library: str) -> None:
    """Checks that all shards of ``name`` have the same size.

    :raises CheckpointError: they differ.
    """
    if any(block % cut.num_shards for block in cut.blocks):
        raise CheckpointError(
            f"`{name}` must be cut into shards of one size for {library}, but dimension {cut.dim} "
            f"has blocks of {list(cut.blocks)} for {cut.num_shards} ranks. Choose another `--tp`, "
            "or another rule for it."
        )


def shard_placeholders(
    checkpoint: Checkpoint, target: Target, shapes: Mapping[str, Index]
) -> list[dict[str, Tensor]]:
    """Returns placeholders for the file of each rank: the shards of weights and buffers, and the
    same under their tied names.

    :param shapes: shapes of shards that differ from their cut.
    """
    ranks = []
    for rank in range(target.tp_size):
        held = {}
        for key, array in checkpoint.tensors.items():
            cut = target.cuts[key.name]
            shape = array.shape if cut is None else cut.shard_shape(array.shape, rank)
            held[key.name] = placeholder(shapes.get(key.name, shape), array.dtype)
        ranks.append(held | {alias: held[name] for alias, name in checkpoint.ties.items()})
    return ranks


def written_shards(
    files: Iterable[TorchFile], models: Iterable[Mapping[str, Tensor]], checkpoint: Checkpoint
) -> dict[str, list[Array]]:
    """Maps names to the arrays of each rank's shard, for writing."""
    pairs = list(zip(files, models, strict=True))
    return {
        key.name: [file.array(model[key.name]) for file, model in pairs]
        for key in checkpoint.tensors
        if key.state == WEIGHT
    }
