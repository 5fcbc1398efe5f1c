"""`save_pretrained()` of models with sharded tables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from inspect import signature
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from tp_embed.gang import Gang
from tp_embed.gang.agreement import raise_together

from .layers import gather_into, sharded_layers, table_shape

# The default of `state_dict`: gather the model's own.
_OWN: Any = object()


class SavesShards:
    """A mixin for models of transformers and PEFT; goes before their class."""

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: dict[str, Any] | None = _OWN,
        **options: Any,
    ) -> Any:
        """Saves the model with whole tables. All ranks must call it; global rank 0 writes.

        Gathers tables into a file next to the output, 16 MiB at a time, and maps it. So whole
        tables take no memory, but twice their size on disk.

        :param state_dict: a state dict with whole tables, which is written without gathering.
            ``None`` on ranks that do not write, as from ``accelerator.get_state_dict(engine)``.
        :raises ValueError: a table in ``state_dict`` is a shard; ``state_dict`` is ``None`` on the
            rank that writes; it is left out but DeepSpeed has cut other layers too; or the rank
            that writes cannot write to ``save_directory``.
        :raises GangError: on the other ranks of its gang, if that rank cannot write.
        """
        save = super().save_pretrained  # type: ignore[misc]
        # Positional arguments; `save_directory` is the first.
        options |= dict(zip([*signature(save).parameters][1:], args, strict=False))
        state_dict = options.pop("state_dict", state_dict)
        if not _is_writer():
            options["is_main_process"] = False
        is_sharded = any(layer.gang.size > 1 for _, layer in sharded_layers(self))
        if state_dict is None and is_sharded and not _is_writer():
            return None
        if state_dict is None and is_sharded:
            raise ValueError(
                "`state_dict` must be a state dict with whole tables, or be left out on all ranks, "
                "but is None on the rank that writes."
            )
        if state_dict is not _OWN and state_dict is not None:
            _check_whole(self, state_dict)
            return save(save_directory, state_dict=state_dict, **options)
        _check_gatherable(self)
        state = whole_state_dict(self, save_directory)
        return save(save_directory, state_dict=state, **options)


def whole_state_dict(model: Module, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the state dict of ``model`` with whole tables on global rank 0, and tables on meta
    elsewhere. The tables are in files under ``directory`` that vanish with the tensors. All ranks
    of the gangs call it.
    """
    state = dict(model.state_dict())
    gathered: dict[Tensor, Tensor] = {}
    for key, layer in sharded_layers(model):
        if layer.weight not in gathered:
            place = partial(_place, directory, table_shape(layer), layer.weight.dtype)
            if _has_writer(layer.gang):
                whole = raise_together(layer.gang, place)
                gather_into(whole, layer)
            else:
                whole = place()
            gathered[layer.weight] = whole
        if key in state:
            state[key] = gathered[layer.weight]
    return state


def _place(directory: str | os.PathLike[str], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Allocates a whole table: in a file on the rank that writes, on meta elsewhere."""
    if not _is_writer():
        return torch.empty(shape, dtype=dtype, device="meta")
    size = math.prod(shape)
    try:
        os.makedirs(directory, exist_ok=True)
        with NamedTemporaryFile(dir=directory, prefix=".table-") as file:
            # On a full disk, writing to a mapped file would kill the process.
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            mapped: Tensor = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    except OSError as e:
        raise ValueError(
            "`save_directory` must be a directory on global rank 0, with space for the tables "
            f"twice, but there is an error: {e}"
        ) from e
    return mapped.view(shape)


def _is_writer() -> bool:
    """Returns whether this is the rank where transformers writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _has_writer(gang: Gang) -> bool:
    return not dist.is_initialized() or 0 in getattr(gang, "global_ranks", [0])


def _check_whole(model: Module, state: Mapping[str, Any]) -> None:
    for key, layer in sharded_layers(model):
        shape, found = table_shape(layer), tuple(getattr(state.get(key), "shape", ()))
        if key in state and found != shape:
            raise ValueError(
                f"`state_dict` must hold `{key}` whole, with the shape {shape}, but has {found}. "
                "Leave `state_dict` out, on all ranks, or pass "
                "`accelerator.get_state_dict(engine)`, or call "
                "`tp_embed.integrations.deepspeed.export(engine, directory)`."
            )


def _check_gatherable(model: Module) -> None:
    """Checks that no layers but ours are cut: only an engine can gather others."""
    ours = {layer.weight for _, layer in sharded_layers(model)}
    for name, parameter in model.named_parameters():
        is_cut = getattr(parameter, "tensor_model_parallel", False) and parameter not in ours
        if is_cut or hasattr(parameter, "ds_id"):
            raise ValueError(
                "`model` must have no Parameters but its tables cut over ranks, but DeepSpeed has "
                f"cut `{name}`. Call `tp_embed.integrations.deepspeed.export(engine, directory)`, "
                "or pass `state_dict=accelerator.get_state_dict(engine)`, on all ranks."
            )
