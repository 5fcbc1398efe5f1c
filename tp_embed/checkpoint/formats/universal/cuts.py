"""Finds how the Parameters of a universal checkpoint were cut. The checkpoint holds them whole.

The model files are copied from an engine, and may describe cuts by affine maps. The file of a
Parameter describes its cut by other keys, which ``load_hp_checkpoint_state()`` of DeepSpeed uses
where the engine does not know it: ``cat_dim``, by default dimension 0; and for stacked blocks
``param_n_sub_params`` if their sizes are equal, else ``sub_param_shape``. See
``merge_tp_slices()`` of ``deepspeed/checkpoint/ds_to_universal.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...cuts import Cut, find_rule
from ...errors import CheckpointError, shown
from ...files.arrays import Index
from ...files.torch_file import TorchFile
from ..deepspeed.layout import Layout


def cuts_of_whole(
    shapes: Mapping[str, Index], layout: Layout, entries: Mapping[str, TorchFile]
) -> dict[str, Cut | None]:
    """Returns the known cuts of tensors with these logical shapes.

    :param layout: the layout recorded in the model files.
    :param entries: the files of Parameters.
    """
    options, tp_size = layout.options, layout.tp_size
    cuts: dict[str, Cut | None] = {}
    for name, shape in shapes.items():
        if options.cuts is not None and name in options.cuts:
            cuts[name] = options.cuts[name]
        elif tp_size == 1:
            continue
        elif affine := layout.map_of(name):
            cut = affine.cut()
            if cut is not None:
                cuts[name] = _resized(name, cut, shape, layout.path)
            elif affine.is_replicated:
                cuts[name] = None
        elif name in entries and (recorded := _recorded_cut(entries[name], shape)):
            dim, blocks = recorded
            cuts[name] = Cut.even(dim, blocks, tp_size)
        elif rule := find_rule(options.rules, name):
            cuts[name] = rule.cut(name, shape, tp_size)
    return cuts


def cut_entries(cut: Cut | None) -> dict[str, int]:
    """Returns the entries that describe ``cut`` in the file of a Parameter. Blocks of different
    sizes have none: they need an object of DeepSpeed, which some readers of such files refuse."""
    try:
        blocks = cut.blocks if cut is not None else ()
    except CheckpointError:  # Only a map can describe it.
        blocks = ()
    if cut is None or len(set(blocks)) != 1:
        return {}
    more = {"param_n_sub_params": len(blocks)} if len(blocks) > 1 else {}
    return {"cat_dim": cut.dim, **more}


def _recorded_cut(file: TorchFile, shape: Index) -> tuple[int, Sequence[int]] | None:
    """Returns the cut dimension and the block sizes along it that the file of a Parameter records.

    :raises CheckpointError: they do not fit ``shape``.
    """
    match file.root:
        case {"sub_param_shape": object(partition_dim=int(dim), shape=tuple(sizes))}:
            blocks = sizes[dim] if dim in range(len(sizes)) else None
        case {"cat_dim": dim, **more}:
            blocks = _equal(shape, dim, more.get("param_n_sub_params", 1))
        case _:
            return None
    if (
        type(dim) is int
        and dim in range(len(shape))
        and isinstance(blocks, (list, tuple))
        and all(type(size) is int and size >= 0 for size in blocks)
        and sum(blocks) == shape[dim]
    ):
        return dim, blocks
    raise CheckpointError(
        f"`{file.path}` must say along which dimension of {shape} its Parameter is cut, and in "
        f"which blocks, but says {shown(dim)} and {shown(blocks)}. Copy the file again."
    )


def _equal(shape: Index, dim: Any, count: Any) -> Any:
    """Returns the sizes of ``count`` equal blocks along ``dim``, or ``None`` if they do not fit."""
    if type(dim) is int and dim in range(len(shape)) and type(count) is int and count > 0:
        size = shape[dim] // count
        return (size,) * count if count <= shape[dim] else None
    return None


def _resized(name: str, cut: Cut, shape: Index, path: Path) -> Cut:
    """Adapts ``cut`` to ``shape``: a vocabulary may have been resized since."""
    if cut.dim < len(shape) and cut.size == shape[cut.dim]:
        return cut
    if cut.dim >= len(shape) or len(cut.blocks) != 1:
        raise CheckpointError(
            f"`{name}` must be cut as the map in `{path}` says, {cut}, but has the shape {shape}. "
            "Copy all files of one checkpoint."
        )
    return Cut.even(cut.dim, (shape[cut.dim],), cut.num_shards)
