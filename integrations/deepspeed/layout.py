"""How Parameters are cut over the tensor-parallel ranks.

DeepSpeed's layers and ours describe it on the Parameters of an engine, and by name in a checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from tp_embed.checkpoint.formats.deepspeed.affine import AffineMap

from .private import DS_AUTOTP_UC_META, resolve_autotp_partition


def map_of(param: Parameter) -> AffineMap | None:
    """Returns the map of ``param``, or ``None`` if it is not known to be cut."""
    conversion = getattr(param, DS_AUTOTP_UC_META, {}).get("conversion", {})
    entry = conversion.get("affine_map")
    return None if entry is None else AffineMap.from_dict(entry)


def local_shape(param: Parameter) -> tuple[int, ...]:
    """Returns the shape of this rank's shard, also at ZeRO 3, where ``param.shape`` differs."""
    return tuple(getattr(param, "ds_shape", param.shape))


def logical_shape(param: Parameter) -> tuple[int, ...]:
    """Returns the shape of the whole Parameter."""
    layout = map_of(param)
    if layout is not None:
        return layout.shape
    meta = getattr(param, DS_AUTOTP_UC_META, {})
    return tuple(meta.get("logical_shape") or local_shape(param))


def own_shard(param: Parameter, key: str, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Returns this rank's shard of ``whole``, the Parameter or its optimizer state ``key``.

    *Shape:* ``local_shape(param)``.
    """
    shard = resolve_autotp_partition(param, {}, whole, tp_rank, tp_size, state_key=key)
    return (whole if shard is None else shard).reshape(local_shape(param))


def has_mixed_up_masters(engine: Any) -> bool:
    """Returns whether DeepSpeed looks up the optimizer state of the wrong Parameter: with
    round-robin gradients, its order differs from the order in the flat tensors."""
    return bool(getattr(engine.optimizer, "round_robin_gradients", False))
