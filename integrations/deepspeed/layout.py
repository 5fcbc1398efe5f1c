"""How Parameters are cut over the tensor-parallel ranks.

DeepSpeed's layers and ours describe it on the Parameters of an engine, and by name in a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.checkpoint.affine import SCALE_POWER_BY_STATE, ParamAffineMap
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AFFINE_MAP_PARAMS,
    DS_AUTOTP_UC_META,
    TP_REPLICATED_PARAMETER_PATTERNS,
)
from deepspeed.checkpoint.universal_checkpoint import _resolve_autotp_partition
from torch import Tensor
from torch.nn import Parameter


def map_of(param: Parameter) -> Any:
    """The ``ParamAffineMap`` of ``param``, or ``None`` if it is not known to be cut."""
    conversion = getattr(param, DS_AUTOTP_UC_META, {}).get("conversion", {})
    entry = conversion.get("affine_map")
    return entry and ParamAffineMap.from_dict(entry)


def local_shape(param: Parameter) -> tuple[int, ...]:
    """The shape of this rank's shard, which at ZeRO 3 is not that of ``param``."""
    return tuple(getattr(param, "ds_shape", param.shape))


def logical_shape(param: Parameter) -> tuple[int, ...]:
    """The shape of the whole Parameter."""
    layout = map_of(param)
    if layout is not None:
        return tuple(layout.logical_shape)
    meta = getattr(param, DS_AUTOTP_UC_META, {})
    return tuple(meta.get("logical_shape") or local_shape(param))


def own_shard(param: Parameter, key: str, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """What this rank holds of ``whole``, which is the Parameter or its optimizer state ``key``.

    *Shape:* that of the rank's shard.
    """
    shard = _resolve_autotp_partition(param, {}, whole, tp_rank, tp_size, state_key=key)
    return (whole if shard is None else shard).reshape(local_shape(param))


class CheckpointLayout:
    """How the Parameters of a checkpoint are cut, by its ``universal_checkpoint_info``."""

    def __init__(self, info: Mapping[str, Any], tp_size: int) -> None:
        self.tp_size = tp_size
        self._maps = info.get(AFFINE_MAP, {}).get(AFFINE_MAP_PARAMS, {})
        self._replicated = set(info.get(TP_REPLICATED_PARAMETER_PATTERNS, []))

    def map_of(self, name: str) -> Any:
        """The ``ParamAffineMap`` of a Parameter, or ``None`` if there is none."""
        entry = self._maps.get(_pattern(name))
        return entry and ParamAffineMap.from_dict(entry)

    def shard_shape(self, name: str, tp_rank: int) -> tuple[int, ...]:
        return tuple(self._map_or_raise(name).shard_shapes[tp_rank])

    def merge(self, name: str, key: str, shards: Sequence[Tensor]) -> Tensor:
        """The whole Parameter, or its optimizer state ``key``, from the shards of the ranks."""
        if len(shards) == 1:
            return shards[0]
        if self.map_of(name) is None and _pattern(name) in self._replicated:
            if all(torch.equal(shard, shards[0]) for shard in shards):
                return shards[0]
            raise ValueError(
                f"`{name}` must be the same on every tensor-parallel rank, but is not."
            )
        whole: Tensor = self._map_or_raise(name).rebuild(
            dict(enumerate(shards)), SCALE_POWER_BY_STATE[key]
        )
        return whole

    def _map_or_raise(self, name: str) -> Any:
        layout = self.map_of(name)
        if layout is None:
            raise ValueError(
                f"`{name}` must be described in the `universal_checkpoint_info` of the checkpoint, "
                f"since it is cut over {self.tp_size} tensor-parallel ranks, but is not. AutoTP "
                "describes its layers and ours; other layers cannot be merged."
            )
        return layout


def _pattern(name: str) -> str:
    return rf"^{re.escape(name)}$"
