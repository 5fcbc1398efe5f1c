"""Hooks that save sharded tables in a chosen form, and load them from any form."""

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
    """In this context ``model.state_dict()`` returns sharded tables in the form ``mode``, and
    ``model.load_state_dict()`` takes them in any form. The same holds for ``optimizer``: its states
    of the shape of a shard, such as moments, take the form of their table, and so do the states of
    :mod:`tp_embed.optim` with one value for each row.

    - ``"full"``: the whole table, on the device of its shard. All ranks of the gang must call
      ``state_dict()``, which sends (P-1) times the largest shard of each table. See
      :func:`full_state_dict` to gather on one rank only.
    - ``"sharded"``: this rank's shard, as without hooks, and a record that identifies it. No
      communication; a rank may call ``state_dict()`` alone.
    - ``"dtensor"``: a :class:`~torch.distributed.tensor.DTensor` over the gang, which
      :mod:`torch.distributed.checkpoint` saves whole, and loads on any other gang. No
      communication, except that a cyclic :class:`~tp_embed.RowWiseEmbedding` moves its rows into
      blocks, and back when it is loaded, by an all-to-all of at most a shard.

    Loading takes a whole table, a DTensor, a ``ShardedTensor`` with a local shard that covers this
    rank's, or this rank's shard. Shapes are logical, without padding. Unexpected and missing keys
    behave as in torch. All ranks of a gang must load a DTensor together: they exchange layouts
    (about 200 bytes each), and gather it with ``full_tensor()`` unless it is replicated or cut like
    the table. A DTensor over ranks outside the gang is refused, since these may not load it.
    Tensors loaded with ``assign=True`` own their memory.

    :mod:`torch.distributed.checkpoint.state_dict` uses the same hooks: ``get_state_dict()`` and
    ``set_state_dict()`` under ``"dtensor"`` resume a training from any gang on any other.

    Tables partitioned by ZeRO 3 stay as they are: DeepSpeed saves and loads them itself.

    :param model: the hooks are registered on this module, not on its submodules.
    :param optimizer: the optimizer of ``model``, or several. In the modes ``"full"`` and
        ``"dtensor"``, any other optimizer over a cut table raises in ``state_dict()``.
    :raises ValueError: ``mode`` is unknown; ``optimizer`` holds no Parameter of ``model``; while
        saving whole tables or DTensors, a state has another shape, as with Adafactor; while
        loading, a state of an optimizer has another shape or is another shard.
    :raises TypeError: ``optimizer`` is no optimizer of torch.
    :raises RuntimeError: while loading, a table has another shape or is another shard.
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
    """Gathers the state dict of ``model`` with whole tables, on the CPU of one rank of each gang.

    All ranks must call it. The others hold 16 MiB of each table at a time.

    :param rank: the rank in its gang that gets the state dict.
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
    """Exports the tables in a state dict in the form ``mode``. Tied tables stay tied."""

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
    """Returns ``shard`` to assign. Copies a view of a larger tensor, so that this can be freed."""
    if shard is value:
        return shard
    shard = local(shard)
    if shard.untyped_storage().nbytes() > shard.nbytes:
        shard = shard.clone(memory_format=torch.contiguous_format)
    return Parameter(shard) if isinstance(value, Parameter) else shard
