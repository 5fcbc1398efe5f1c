"""Hooks by which the state dict of a model holds its sharded tables in the form that is asked for,
and takes them in any form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from tp_embed.checkpoint.dtensors import DTensors, as_dtensor
from tp_embed.collectives import whole_table
from tp_embed.gang import Gang
from tp_embed.head import ShardedLayer
from tp_embed.sharded_parameter import local

Mode = Literal["full", "sharded", "dtensor"]

# The key of what a state dict says of a shard, in its metadata.
_RECORD = "tp_embed_shard"


@contextmanager
def hook_state_dict(model: Module, mode: Mode = "full") -> Iterator[None]:
    """In this context ``model.state_dict()`` holds the tables of ``model`` in the form ``mode``,
    and ``model.load_state_dict()`` takes them in any form.

    - ``"full"``: the whole table, on the device of its shard. All ranks of the gang have to call
      ``state_dict()``; it sends (P-1) times the largest shard of each table. See
      :func:`full_state_dict` for one rank only.
    - ``"sharded"``: this rank's shard, as without hooks, and what it is a shard of. Nothing is
      sent, and a rank may call ``state_dict()`` alone.
    - ``"dtensor"``: a :class:`~torch.distributed.tensor.DTensor` over the gang, which
      :mod:`torch.distributed.checkpoint` saves as a whole and loads with any other gang. Nothing
      is sent.

    Loading takes a whole table, a DTensor (it is put together, by all ranks, if it is cut in
    another way), a ``ShardedTensor`` of which the local shards cover this rank's, or this rank's
    shard. Shapes are logical ones, without padding. Unexpected and missing keys are as in torch.

    Tables that ZeRO 3 has partitioned stay as they are: DeepSpeed saves and loads them itself.

    :param model: the hooks are those of this module, not of its submodules.
    :raises ValueError: ``mode`` is something else.
    :raises RuntimeError: while loading, for a table of another shape, or another shard.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"`mode` must be one of {get_args(Mode)}, but is {mode!r} instead.")
    export = {"full": _gathered, "sharded": _own_shard, "dtensor": _as_dtensor}[mode]
    handles = [
        model.register_state_dict_post_hook(_SaveHook(export)),
        model.register_load_state_dict_pre_hook(_before_load),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def full_state_dict(model: Module, *, rank: int = 0) -> dict[str, Tensor] | None:
    """The state dict of ``model`` with whole tables, on the CPU of one rank of each gang.

    All ranks have to call it, so that none is waited for in vain; the others hold 16 MiB of each
    table at a time.

    :param rank: the rank in its gang of who gets it.
    :returns: the state dict on ``rank``; ``None`` on the other ranks.
    """
    layers = dict(_layers(model))
    with hook_state_dict(model, "sharded"):
        state = model.state_dict()
    whole: dict[Tensor, Tensor] = {}
    for name, layer in layers.items():
        if layer.weight not in whole and not _is_partitioned(layer):
            device = "cpu" if layer.gang.rank == rank else "meta"
            whole[layer.weight] = _gathered(layer, device)
        state[f"{name}weight"] = whole.get(layer.weight, state[f"{name}weight"])
    if any(layer.gang.rank != rank for layer in layers.values()):
        return None
    return {key: tensor.cpu() for key, tensor in state.items()}


class _SaveHook:
    """Replaces the tables in a state dict by what ``export`` makes of them; what is tied stays."""

    def __init__(self, export: Callable[[ShardedLayer], Tensor]) -> None:
        self._export = export

    def __call__(self, model: Module, state: Any, prefix: str, local_metadata: Any) -> None:
        exported: dict[Tensor, Tensor] = {}
        for name, layer in _layers(model):
            key = f"{prefix}{name}weight"
            if key not in state or _is_partitioned(layer):
                continue
            if layer.weight not in exported:
                exported[layer.weight] = self._export(layer)
            state[key] = exported[layer.weight]
            # A whole table is a shard of nothing.
            if self._export is _own_shard and layer.gang.size > 1 and hasattr(state, "_metadata"):
                state._metadata[f"{prefix}{name}"[:-1]][_RECORD] = _record(layer)


def _before_load(
    model: Module,
    state: Any,
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    metadata = getattr(state, "_metadata", None) or {}
    layers = {f"{prefix}{name}weight": layer for name, layer in _layers(model)}
    layers = {k: e for k, e in layers.items() if k in state and not _is_partitioned(e)}
    values = {key: state[key] for key in layers}
    dtensors = DTensors(
        {k: (value, layers[k].gang) for k, value in values.items() if isinstance(value, DTensor)}
    )
    assigned: dict[tuple[Tensor, int], Tensor] = {}
    for key, layer in layers.items():
        value, record = values[key], metadata.get(key.rpartition(".")[0], {}).get(_RECORD)
        try:
            shard = _cut(layer, key, value, dtensors, record)
        except ValueError as e:
            error_msgs.append(f"`{key}` {e}")
            shard = layer.weight  # So that torch does not complain as well.
        if local_metadata.get("assign_to_params_buffers") and shard is not layer.weight:
            # Tied weights stay one memory, as in torch.
            shard = assigned.setdefault((layer.weight, id(value)), _owned(shard, value))
        state[key] = shard


def _owned(shard: Tensor, value: Tensor) -> Tensor:
    """A shard to assign; if it is cut out of a larger tensor, a copy, which lets that go."""
    if shard is value:
        return shard
    shard = local(shard)
    if shard.untyped_storage().nbytes() > shard.nbytes:
        shard = shard.clone(memory_format=torch.contiguous_format)
    return Parameter(shard) if isinstance(value, Parameter) else shard


def _layers(model: Module) -> Iterator[tuple[str, ShardedLayer]]:
    """The sharded layers, each with the prefix of its keys."""
    for name, module in model.named_modules():
        if isinstance(module, ShardedLayer):
            yield f"{name}." if name else "", module


def _is_partitioned(layer: ShardedLayer) -> bool:
    """Whether ZeRO 3 has taken the weight away."""
    return hasattr(layer.weight, "ds_shape")


def _shape(layer: ShardedLayer) -> tuple[int, int]:
    rows, columns = layer.weight.shape
    size = layer.partition.size
    return (rows, size) if layer.shard_dim else (size, columns)


def _record(layer: ShardedLayer) -> dict[str, int]:
    gang: Gang = layer.gang
    return {"dim": layer.shard_dim, "rank": gang.rank, "num_shards": gang.size}


def _gathered(layer: ShardedLayer, device: torch.device | str | None = None) -> Tensor:
    weight = local(layer.weight)
    if layer.gang.size == 1:
        return weight if device is None else weight.to(device)
    return whole_table(weight, layer.shard_dim, layer.gang, layer.partition, device)


def _own_shard(layer: ShardedLayer) -> Tensor:
    return local(layer.weight)


def _as_dtensor(layer: ShardedLayer) -> Tensor:
    return as_dtensor(local(layer.weight), layer.shard_dim, _shape(layer), layer.gang)


def _cut(
    layer: ShardedLayer, key: str, value: Any, dtensors: DTensors, record: dict[str, int] | None
) -> Tensor:
    """This rank's shard out of what a state dict holds at ``key``."""
    own, shape, dim = tuple(layer.weight.shape), _shape(layer), layer.shard_dim
    block = layer.partition.shard(layer.gang.rank)
    if isinstance(value, DTensor):
        value, is_whole = dtensors.on_this_rank(key, value, dim, shape, layer.gang)
        return value.narrow(dim, block.start, len(block)) if is_whole else value  # type: ignore[no-any-return]
    if hasattr(value, "local_shards"):
        _check_shape(tuple(value.size()), shape)
        return _cut_shards(layer, value)
    if record not in (None, _record(layer)):
        raise ValueError(
            f"must be whole or this rank's shard {_record(layer)}, but is the shard "
            f"{record} instead. Save it whole, or as a DTensor."
        )
    if tuple(value.shape) == own:
        return value  # type: ignore[no-any-return]
    if tuple(value.shape) != shape:
        raise ValueError(
            f"must have the shape {shape}, or {own} as the shard of rank {layer.gang.rank} of "
            f"{layer.gang.size}, but has {tuple(value.shape)} instead."
        )
    return value.narrow(dim, block.start, len(block))  # type: ignore[no-any-return]


def _check_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"must have the shape {expected}, but has {found} instead.")


def _cut_shards(layer: ShardedLayer, value: Any) -> Tensor:
    """This rank's shard out of the local ones of a ``ShardedTensor``."""
    dim, own = layer.shard_dim, layer.partition.shard(layer.gang.rank)
    for shard in value.local_shards():
        start, size = shard.metadata.shard_offsets[dim], shard.metadata.shard_sizes[dim]
        is_whole_across = shard.metadata.shard_sizes[1 - dim] == layer.weight.shape[1 - dim]
        if start <= own.start and own.stop <= start + size and is_whole_across:
            return shard.tensor.narrow(dim, own.start - start, len(own))  # type: ignore[no-any-return]
    raise ValueError(
        f"must have a local shard that covers {own} along dimension {dim}, but has none. Save it "
        "whole, or as a DTensor."
    )
