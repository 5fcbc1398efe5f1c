"""How the Parameters of a universal checkpoint were cut, which are whole in it.

Its model files are copies of those of an engine, and can say it by affine maps. The file of a
Parameter says it in words of its own, which ``load_hp_checkpoint_state()`` of DeepSpeed cuts by
where an engine does not know it: along ``cat_dim``, or else dimension 0; and what is stacked from
blocks by ``param_n_sub_params``, if they are of one size, or by ``sub_param_shape``. See
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
    """How tensors of these logical shapes were cut, as far as that is known.

    :param layout: by what the model files say.
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
        elif name in entries and (said := _said(entries[name], shape)):
            dim, blocks = said
            cuts[name] = Cut.even(dim, blocks, tp_size)
        elif rule := find_rule(options.rules, name):
            cuts[name] = rule.cut(name, shape, tp_size)
    return cuts


def cut_entries(cut: Cut | None) -> dict[str, int]:
    """What the file of a Parameter says of how it is cut. Of blocks of different sizes it says
    nothing: that takes an object of DeepSpeed, which not all that read such files allow."""
    try:
        blocks = cut.blocks if cut is not None else ()
    except CheckpointError:  # Only a map can say it.
        blocks = ()
    if cut is None or len(set(blocks)) != 1:
        return {}
    more = {"param_n_sub_params": len(blocks)} if len(blocks) > 1 else {}
    return {"cat_dim": cut.dim, **more}


def _said(file: TorchFile, shape: Index) -> tuple[int, Sequence[int]] | None:
    """Along which dimension the file of a Parameter says that it is cut, and the sizes of the
    blocks that are stacked along that.

    :raises CheckpointError: they are not those of ``shape``.
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
    """The sizes of ``count`` equal blocks along ``dim``, if there can be so many."""
    if type(dim) is int and dim in range(len(shape)) and type(count) is int and count > 0:
        size = shape[dim] // count
        return (size,) * count if count <= shape[dim] else None
    return None


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
