"""Hooks by which the state dict of a model holds its sharded tables in the form that is asked for,
and takes them in any form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from tp_embed._torch_private import metadata_of
from tp_embed.nn.gang_layer import SHARD_RECORD
from tp_embed.parameter.sharded import local
from tp_embed.state_dict.dtensors import DTensors
from tp_embed.state_dict.moments import hook_optimizers
from tp_embed.state_dict.shards import (
    EXPORTS,
    cut_block,
    gathered,
    is_partitioned,
    layers_of,
)

Mode = Literal["full", "sharded", "dtensor"]


@contextmanager
def hook_state_dict(
    model: Module, mode: Mode = "full", *, optimizer: Optimizer | Iterable[Optimizer] = ()
) -> Iterator[None]:
    """In this context ``model.state_dict()`` holds the tables of ``model`` in the form ``mode``,
    and ``model.load_state_dict()`` takes them in any form. So do those of ``optimizer``, whose
    states of the shape of a shard, such as moments, take the form of their table.

    - ``"full"``: the whole table, on the device of its shard. All ranks of the gang have to call
      ``state_dict()``; it sends (P-1) times the largest shard of each table. See
      :func:`full_state_dict` for one rank only.
    - ``"sharded"``: this rank's shard, as without hooks, and what it is a shard of. Nothing is
      sent, and a rank may call ``state_dict()`` alone.
    - ``"dtensor"``: a :class:`~torch.distributed.tensor.DTensor` over the gang, which
      :mod:`torch.distributed.checkpoint` saves as a whole and loads with any other gang. Nothing
      is sent.

    Loading takes a whole table, a DTensor, a ``ShardedTensor`` of which the local shards cover this
    rank's, or this rank's shard. Shapes are logical ones, without padding. Unexpected and missing
    keys are as in torch. All ranks of a gang have to load a DTensor; they tell each other how it is
    cut (some 200 bytes from each), and put it together with ``full_tensor()`` unless it is
    replicated, or cut as the table is. One over ranks that are not in the gang, which may not come
    along, is refused. What is loaded with ``assign=True`` owns its memory.

    :mod:`torch.distributed.checkpoint.state_dict` goes through the same hooks: with
    ``get_state_dict()`` and ``set_state_dict()`` under ``"dtensor"`` a training goes on from any
    gang on any other.

    Tables that ZeRO 3 has partitioned stay as they are: DeepSpeed saves and loads them itself.

    :param model: the hooks are those of this module, not of its submodules.
    :param optimizer: the optimizer of ``model``, or several. One that is left out raises when it
        gives its state of a table that is cut, unless it is in shards that are saved.
    :raises ValueError: ``mode`` is something else, ``optimizer`` holds no Parameter of ``model``;
        while saving whole tables or DTensors, for a state of another shape, as Adafactor has; while
        loading, for a state of an optimizer that has another shape or is of another shard.
    :raises TypeError: ``optimizer`` is no optimizer of torch.
    :raises RuntimeError: while loading, for a table of another shape, or another shard.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"`mode` must be one of {get_args(Mode)}, but is {mode!r} instead.")
    handles = [
        model.register_state_dict_post_hook(_SaveHook(mode)),
        model.register_load_state_dict_pre_hook(_before_load),
    ]
    try:
        with hook_optimizers(model, mode, optimizer):
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
    layers = dict(layers_of(model))
    with hook_state_dict(model, "sharded"):
        state = model.state_dict()
    whole: dict[Tensor, Tensor] = {}
    for name, layer in layers.items():
        if layer.weight not in whole and not is_partitioned(layer):
            device = "cpu" if layer.gang.rank == rank else "meta"
            whole[layer.weight] = gathered(layer, local(layer.weight), device)
        state[f"{name}weight"] = whole.get(layer.weight, state[f"{name}weight"])
    if any(layer.gang.rank != rank for layer in layers.values()):
        return None
    return {key: tensor.cpu() for key, tensor in state.items()}


class _SaveHook:
    """Replaces the tables in a state dict by what ``export`` makes of them; what is tied stays."""

    def __init__(self, mode: Mode) -> None:
        self._mode, self._export = mode, EXPORTS[mode]

    def __call__(self, model: Module, state: Any, prefix: str, local_metadata: Any) -> None:
        exported: dict[Tensor, Tensor] = {}
        for name, layer in layers_of(model):
            key = f"{prefix}{name}weight"
            if key not in state or is_partitioned(layer):
                continue
            if layer.weight not in exported:
                exported[layer.weight] = self._export(layer, local(layer.weight))
            state[key] = exported[layer.weight]
            if self._mode != "sharded":
                # A whole table is a shard of nothing.
                metadata_of(state).get(f"{prefix}{name}"[:-1], {}).pop(SHARD_RECORD, None)


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
    metadata = metadata_of(state)
    layers = {f"{prefix}{name}weight": layer for name, layer in layers_of(model)}
    layers = {k: e for k, e in layers.items() if k in state and not is_partitioned(e)}
    values = {key: state[key] for key in layers}
    dtensors = DTensors(
        {k: (value, layers[k].gang) for k, value in values.items() if isinstance(value, DTensor)}
    )
    assigned: dict[tuple[Tensor, int], Tensor] = {}
    for key, layer in layers.items():
        value, record = values[key], metadata.get(key.rpartition(".")[0], {}).get(SHARD_RECORD)
        try:
            shard = cut_block(layer, key, value, dtensors, record)
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
