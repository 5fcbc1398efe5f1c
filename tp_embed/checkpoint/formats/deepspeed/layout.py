"""Joins shards as the ``universal_checkpoint_info`` of a checkpoint describes their cuts.

The info has affine maps, written by AutoTP and this package, or lists of name patterns, written by
Megatron-DeepSpeed and by DeepSpeed before it had maps. ``merge_tp_slices()`` of
``deepspeed/checkpoint/ds_to_universal.py`` defines the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contents import ReadOptions
from ...cuts import Cut, find_rule, join, whole_shape
from ...errors import CheckpointError
from ...files.arrays import Array, Index, part
from .affine import AffineMap, find_maps
from .files import expect, optional
from .patterns import Patterns, of_name


class Layout:
    """Joins the shards of a checkpoint.

    :param info: the ``universal_checkpoint_info``, or ``None``.
    :param path: the file that contains it.
    """

    def __init__(self, info: Any, tp_size: int, options: ReadOptions, path: Path) -> None:
        self._info = optional(info, dict, "`universal_checkpoint_info`", path)
        self.tp_size = tp_size
        self.options = options
        self.path = path
        self._maps = find_maps(self._info, path)
        self._patterns: dict[str, Patterns] = {}
        self._stacked = _stacked(self._info.get("parameter_with_sub_params"), path)
        self.cuts: dict[str, Cut | None] = {}

    def join(self, name: str, what: str, shards: Sequence[Array], is_buffer: bool) -> Array:
        """Joins the ranks' shards of a Parameter or its state. Records the cut in :attr:`cuts`.

        :raises CheckpointError: the cut is unknown, or the shards do not fit it.
        """
        given = self.options.cuts
        if given is not None and name in given:
            cut = given[name]
            self.cuts[name] = cut
            return join(what, cut if self.tp_size > 1 else None, shards)
        if self.tp_size == 1:
            return self._single_rank(name, shards[0], is_buffer)
        found = None if is_buffer else self._by_map(name, what, shards)
        if found is None and self._matches("tp_replicated_parameter_patterns", name):
            found = self._cut(name, what, shards, None)
        if found is None and self._info and not self._maps and not is_buffer:
            found = self._by_patterns(name, what, shards)
        return self._by_rule(name, what, shards, is_buffer) if found is None else found

    def map_of(self, name: str) -> AffineMap | None:
        """Returns the map of a Parameter, or ``None``."""
        entry = self._maps.get(of_name(name))
        return None if entry is None else AffineMap.parse(name, entry, self.tp_size, self.path)

    def _by_map(self, name: str, what: str, shards: Sequence[Array]) -> Array | None:
        key = "autotp_unsupported_parameter_patterns"
        reason = optional(self._info.get(key), dict, f"`{key}`", self.path).get(of_name(name))
        if reason is not None:
            if find_rule(self.options.rules, name):
                return None
            raise CheckpointError(
                f"`{name}` must be cut in a way that can be undone, but the checkpoint says it is "
                f"not: {reason}. If you know how it is cut, say so with `--rules`."
            )
        layout = self.map_of(name)
        if layout is None:
            return None
        if layout.is_replicated:
            self.cuts[name] = None
            return join(what, None, shards)
        cut = layout.cut()
        if cut is not None:
            self.cuts[name] = cut
        return layout.join(what, shards)

    def _single_rank(self, name: str, whole: Array, is_buffer: bool) -> Array:
        """Returns the tensor of a single rank, without padding. Records no cut: with one rank,
        the info may call tensors replicated that could be cut."""
        if self._maps or is_buffer or not self._matches("vocabulary_parameter_patterns", name):
            return whole
        return self._without_padding(name, whole)

    def _by_patterns(self, name: str, what: str, shards: Sequence[Array]) -> Array:
        if self._matches("parameter_to_average_patterns", name):
            self.cuts[name] = None
            return Mean(what, shards)
        cut = self._sub_params(name, what, shards)
        if cut is None:
            is_row = self._matches("parameter_with_row_parallelism_patterns", name)
            sizes = [self._size(what, shard, int(is_row)) for shard in shards]
            cut = _cut_of_widths(int(is_row), [sizes])
        whole = self._cut(name, what, shards, cut)
        if self._matches("vocabulary_parameter_patterns", name):
            whole = self._without_padding(name, whole)
            self.cuts[name] = Cut.even(cut.dim, (whole.shape[cut.dim],), self.tp_size)
        return whole

    def _sub_params(self, name: str, what: str, shards: Sequence[Array]) -> Cut | None:
        """Returns the cut of a Parameter stacked from several that are cut one by one."""
        if self._matches("parameter_with_2_sub_params_cat_dim_0", name):
            return _cut_of_widths(0, [[self._size(what, s, 0, 2) // 2 for s in shards]] * 2)
        for patterns, sizes, dim in self._stacked:
            pattern = patterns.find(name)
            if pattern is not None:
                return _cut_of_widths(dim, self._widths(name, what, shards, pattern, sizes, dim))
        return None

    def _widths(
        self, name: str, what: str, shards: Sequence[Array], pattern: str, sizes: Any, dim: int
    ) -> list[Sequence[int]]:
        """Returns the size of each rank's shard of each stacked part."""
        key = "sub_param_shard_widths"
        widths = optional(self._info.get(key), dict, f"`{key}`", self.path).get(pattern)
        if widths is None:  # Before version 0.4, which cuts all evenly.
            blocks = sizes[dim]
            if type(blocks) is int:
                total = sum(self._size(what, shard, dim, max(1, blocks)) for shard in shards)
                blocks = (total // max(1, blocks),) * blocks
            widths = [[block // len(shards)] * len(shards) for block in blocks]
        if isinstance(widths, list) and all(
            isinstance(own, (list, tuple))
            and len(own) == len(shards)
            and all(type(width) is int and width >= 0 for width in own)
            for own in widths
        ):
            return list(widths)
        raise CheckpointError(
            f"`{name}` must have the widths of its parts on {len(shards)} ranks in "
            f"`{self.path}`, but has {str(widths)[:100]}."
        )

    def _by_rule(self, name: str, what: str, shards: Sequence[Array], is_buffer: bool) -> Array:
        rule = find_rule(self.options.rules, name)
        if rule is not None:
            if rule.dim is None:
                return self._cut(name, what, shards, None)
            shape = whole_shape(what, rule.dim, shards)
            return self._cut(name, what, shards, rule.cut(name, shape, len(shards)))
        if is_buffer:  # DeepSpeed cuts no buffers. Reading compares the copies.
            return self._cut(name, what, shards, None)
        raise CheckpointError(
            f"The checkpoint must say how `{name}` is cut over its {self.tp_size} tensor-parallel "
            f"ranks, but the `universal_checkpoint_info` in `{self.path}` does not. AutoTP writes "
            "it, and so does `shard_embeddings()`. Say it with `--rules`."
        )

    def _cut(self, name: str, what: str, shards: Sequence[Array], cut: Cut | None) -> Array:
        self.cuts[name] = cut
        return join(what, cut, shards)

    def _without_padding(self, name: str, whole: Array) -> Array:
        rows = self._info.get("original_vocab_size")
        if type(rows) is not int or not 0 < rows <= whole.shape[0]:
            raise CheckpointError(
                f"`original_vocab_size` in `{self.path}` must be from 1 to {whole.shape[0]}, the "
                f"rows of `{name}`, but is {rows}."
            )
        if rows == whole.shape[0]:
            return whole
        return part(whole, (0,) * len(whole.shape), (rows, *whole.shape[1:]))

    def _size(self, what: str, shard: Array, dim: int, multiple_of: int = 1) -> int:
        size = shard.shape[dim] if 0 <= dim < len(shard.shape) else -1
        if size < 0 or multiple_of < 1 or size % multiple_of:
            raise CheckpointError(
                f"`{what}` must have a dimension {dim} of a multiple of {multiple_of}, as the "
                f"patterns in `{self.path}` say, but has the shape {shard.shape}. Say how it is "
                "cut with `--rules`, and remove the patterns."
            )
        return size

    def _matches(self, key: str, name: str) -> bool:
        if key not in self._patterns:
            self._patterns[key] = Patterns(self._info.get(key), self.path)
        return self._patterns[key].find(name) is not None


class Mean(Array):
    """The mean of an array over ranks, for values that drift apart in training. Read-only."""

    def __init__(self, what: str, arrays: Sequence[Array]) -> None:
        if len({(array.shape, array.dtype) for array in arrays}) != 1:
            raise CheckpointError(
                f"`{what}` must have one shape and dtype on all ranks, but is {list(arrays)}."
            )
        super().__init__(arrays[0].shape, arrays[0].dtype)
        self._arrays = arrays

    def read(self, start: Index, out: Tensor) -> None:
        self._arrays[0].read(start, out)
        other = torch.empty(out.shape, dtype=out.dtype)
        for array in self._arrays[1:]:
            array.read(start, other)
            out.add_(other)
        out.div_(len(self._arrays))

    def write(self, start: Index, values: Tensor) -> None:
        raise NotImplementedError("A mean is read-only.")


def _cut_of_widths(dim: int, widths: Sequence[Sequence[int]]) -> Cut:
    """Returns a cut of stacked blocks. ``widths`` has the size of each rank's shard per block."""
    flat = [width for block in widths for width in block]
    starts = iter([0, *accumulate(flat)])
    blocks = [
        [range(start, start + width) for width in block for start in [next(starts)]]
        for block in widths
    ]
    return Cut(dim, tuple(zip(*blocks, strict=True)))


def _stacked(value: Any, path: Path) -> list[tuple[Patterns, Sequence[Any], int]]:
    """Parses the entries for stacked Parameters: patterns, sizes, and the stacked dimension."""
    found: list[tuple[Patterns, Sequence[Any], int]] = []
    for entry in optional(value, list, "`parameter_with_sub_params`", path):
        values = expect(getattr(entry, "__dict__", entry), dict, "A part of it", path)
        sizes, dim = values.get("shape"), values.get("partition_dim")
        if (
            not isinstance(sizes, (list, tuple))
            or type(dim) is not int
            or dim not in range(len(sizes))
        ):
            raise CheckpointError(
                f"`parameter_with_sub_params` in `{path}` must have a shape and a dimension of it, "
                f"but has {str(values)[:100]}."
            )
        found.append((Patterns(values.get("patterns"), path), sizes, dim))
    return found
