"""What DeepSpeed's universal checkpoints have to know of how Parameters are cut: the
``universal_checkpoint_info``, with the maps of ``deepspeed/checkpoint/affine.py``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...arrays import contiguous_strides
from ...cuts import Cut


def write_info(
    shapes: Mapping[str, Sequence[int]],
    cuts: Mapping[str, Cut | None],
    tp_size: int,
    trained: Collection[str],
) -> dict[str, Any]:
    """The info of tensors with these logical shapes.

    :param trained: what is listed for converters that do not know the maps. Such a list must not
        have what an optimizer does not.
    """
    listed = [name for name in shapes if name in trained]
    stacked = {
        name: cut
        for name in listed
        for cut in [cuts[name]]
        if cut is not None and len({len(parts) for parts in cut.ranges} | {1}) == 2
    }
    widths = {_pattern(name): _widths(cut) for name, cut in stacked.items()}
    return {
        "universal_checkpoint_version": 0.4,
        "parameter_with_row_parallelism_patterns": sorted(
            _pattern(name) for name in listed if _is_plain(cuts[name], 1)
        ),
        "tp_replicated_parameter_patterns": sorted(
            _pattern(name) for name in listed if cuts[name] is None
        ),
        "vocabulary_parameter_patterns": [],
        "parameter_with_sub_params": [
            {
                "patterns": [_pattern(name)],
                "shape": [
                    tuple(map(sum, _widths(cut))) if dim == cut.dim else size
                    for dim, size in enumerate(shapes[name])
                ],
                "partition_dim": cut.dim,
            }
            for name, cut in stacked.items()
        ],
        **({"sub_param_shard_widths": widths} if widths else {}),
        "autotp_unsupported_parameter_patterns": {},
        "affine_map": {
            "version": 1,
            "params": {
                _pattern(name): write_map(shape, cuts[name], tp_size)
                for name, shape in shapes.items()
            },
        },
    }


def write_map(shape: Sequence[int], cut: Cut | None, tp_size: int) -> dict[str, Any]:
    """How a tensor of ``shape`` is cut, as ``ParamAffineMap.to_dict()`` says it."""
    ranks = {}
    for rank in range(tp_size):
        own = tuple(shape) if cut is None else cut.shard_shape(shape, rank)
        pieces = []
        if cut is None:
            pieces.append(_piece(shape, shape, own, 0, 0, range(tp_size)))
        else:
            place = 0
            for part in cut.ranges[rank]:
                box = [*shape[: cut.dim], len(part), *shape[cut.dim + 1 :]]
                source = part.start * contiguous_strides(shape)[cut.dim]
                dest = place * contiguous_strides(own)[cut.dim]
                pieces.append(_piece(box, shape, own, source, dest, (rank,)))
                place += len(part)
        ranks[rank] = {"shard_shape": list(own), "pieces": pieces}
    return {"logical_shape": list(shape), "ranks": ranks}


def _piece(
    box: Sequence[int],
    whole: Sequence[int],
    shard: Sequence[int],
    source: int,
    dest: int,
    ranks: Sequence[int],
) -> dict[str, Any]:
    return {
        "shape": list(box),
        "source": [source, list(contiguous_strides(whole))],
        "dest": [dest, list(contiguous_strides(shard))],
        "locations": list(ranks),
    }


def _is_plain(cut: Cut | None, dim: int) -> bool:
    """Whether it is one block that is cut along ``dim``."""
    return cut is not None and cut.dim == dim and all(len(parts) == 1 for parts in cut.ranges)


def _widths(cut: Cut) -> list[list[int]]:
    """How much each rank has of each of the blocks that are stacked."""
    return [list(map(len, parts)) for parts in zip(*cut.ranges, strict=True)]


def _pattern(name: str) -> str:
    return rf"^{re.escape(name)}$"
