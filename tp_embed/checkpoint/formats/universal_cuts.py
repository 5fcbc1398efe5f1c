"""How the Parameters of a universal checkpoint were cut, which are whole in it: its model files
are copies of those of an engine, and say it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arrays import Index
from ..cuts import Cut, find_rule
from ..errors import CheckpointError
from ..logical import ReadOptions
from .deepspeed.affine import AffineMap, find_maps
from .deepspeed.patterns import of_name


def cuts_of_whole(
    shapes: Mapping[str, Index],
    info: Mapping[str, Any],
    tp_size: int,
    options: ReadOptions,
    path: Path,
) -> dict[str, Cut | None]:
    """How tensors of these logical shapes were cut, as far as that is known.

    :param info: the ``universal_checkpoint_info``, with DeepSpeed's affine maps.
    :param path: the file that it is from.
    """
    maps = find_maps(info, path)
    cuts: dict[str, Cut | None] = {}
    for name, shape in shapes.items():
        rule = find_rule(options.rules, name)
        if options.cuts is not None and name in options.cuts:
            cuts[name] = options.cuts[name]
        elif tp_size > 1 and of_name(name) in maps:
            layout = AffineMap.parse(name, maps[of_name(name)], tp_size, path)
            cut = layout.cut()
            if cut is not None:
                cuts[name] = _resized(name, cut, shape, path)
            elif layout.is_replicated:
                cuts[name] = None
        elif tp_size > 1 and rule is not None:
            cuts[name] = rule.cut(name, shape, tp_size)
    return cuts


def _resized(name: str, cut: Cut, shape: Index, path: Path) -> Cut:
    """``cut`` for a tensor of ``shape``: a vocabulary may have been resized since."""
    if cut.dim < len(shape) and cut.size == shape[cut.dim]:
        return cut
    if cut.dim >= len(shape) or len(cut.blocks) != 1:
        raise CheckpointError(
            f"`{name}` must be cut as the map in `{path}` says, {cut}, but has the shape {shape}. "
            "Copy all files of one checkpoint."
        )
    return Cut.even(cut.dim, (shape[cut.dim],), cut.num_shards)
