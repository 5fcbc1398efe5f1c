"""Writes the ``universal_checkpoint_info``, which tells DeepSpeed how Parameters are cut, with the
maps of ``deepspeed/checkpoint/affine.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...cuts import Cut
from .affine import VERSION, AffineMap
from .patterns import of_name


def write_info(
    shapes: Mapping[str, Sequence[int]],
    cuts: Mapping[str, Cut | None],
    tp_size: int,
    trained: Collection[str],
) -> dict[str, Any]:
    """Returns the info for tensors with these logical shapes.

    :param trained: Parameters to list for converters that do not read the maps. These fail on
        names that an optimizer lacks.
    """
    listed = [name for name in shapes if name in trained]
    stacked = {
        name: cut
        for name in listed
        for cut in [cuts[name]]
        if cut is not None and len({len(parts) for parts in cut.ranges} | {1}) == 2
    }
    widths = {of_name(name): _widths(cut) for name, cut in stacked.items()}
    return {
        "universal_checkpoint_version": 0.4,
        "parameter_with_row_parallelism_patterns": sorted(
            of_name(name) for name in listed if _is_plain(cuts[name], 1)
        ),
        "tp_replicated_parameter_patterns": sorted(
            of_name(name) for name in listed if cuts[name] is None
        ),
        "vocabulary_parameter_patterns": [],
        "parameter_with_sub_params": [
            {
                "patterns": [of_name(name)],
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
            "version": VERSION,
            "params": {
                of_name(name): AffineMap.of(shape, cuts[name], tp_size).to_dict()
                for name, shape in shapes.items()
            },
        },
    }


def _is_plain(cut: Cut | None, dim: int) -> bool:
    """Returns whether ``cut`` cuts a single block along ``dim``."""
    return cut is not None and cut.dim == dim and all(len(parts) == 1 for parts in cut.ranges)


def _widths(cut: Cut) -> list[list[int]]:
    """Returns the size of each rank's shard of each stacked block."""
    return [list(map(len, parts)) for parts in zip(*cut.ranges, strict=True)]
