"""`save_pretrained()` of models with sharded tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from tp_embed.gang import Gang

from .layers import gather_into, sharded_layers, table_shape

# What `state_dict` is where it is left out.
_OWN: Any = object()


class SavesShards:
    """Comes before the class of a model of transformers or of PEFT."""

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: dict[str, Any] | None = _OWN,
        **options: Any,
    ) -> Any:
        """As that of the class, with whole tables: all ranks call it, and global rank 0 writes.

        It gathers tables into a file beside those that it writes, 16 MiB at a time, and maps that
        into its memory; so it needs none for whole tables, and the room on disk twice.

        :param state_dict: what to write, with whole tables; then no rank gathers, and ``None`` is
            for ranks that do not write, as from ``accelerator.get_state_dict(engine)``.
        :raises ValueError: a table in ``state_dict`` is a shard, or it is left out and DeepSpeed
            has cut other layers too, or is ``None`` on the rank that writes.
        """
        if not _is_writer():
            options["is_main_process"] = False
        save = super().save_pretrained  # type: ignore[misc]
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
            return save(save_directory, *args, state_dict=state_dict, **options)
        _check_gatherable(self)
        if _is_writer():
            os.makedirs(save_directory, exist_ok=True)
        with whole_state_dict(self, save_directory) as state:
            return save(save_directory, *args, state_dict=state, **options)


@contextmanager
def whole_state_dict(model: Module, directory: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The state dict of ``model`` with whole tables on global rank 0, in files under ``directory``
    in this context; on other ranks they are on meta. All ranks of the gangs call it."""
    state = dict(model.state_dict())
    with TemporaryDirectory(dir=directory if _is_writer() else None, prefix=".tables-") as folder:
        gathered: dict[Tensor, Tensor] = {}
        for key, layer in sharded_layers(model):
            if layer.weight not in gathered:
                file = Path(folder) / str(len(gathered))
                whole = _table_on_disk(file, table_shape(layer), layer.weight.dtype)
                if _has_writer(layer.gang):
                    gather_into(whole, layer)
                gathered[layer.weight] = whole
            if key in state:
                state[key] = gathered[layer.weight]
        yield state


def _table_on_disk(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if not _is_writer():
        return torch.empty(shape, dtype=dtype, device="meta")
    size = shape[0] * shape[1]
    mapped: Tensor = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
    return mapped.view(shape)


def _is_writer() -> bool:
    """Whether this is the rank on which transformers writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _has_writer(gang: Gang) -> bool:
    return not dist.is_initialized() or 0 in getattr(gang, "global_ranks", [0])


def _check_whole(model: Module, state: Mapping[str, Any]) -> None:
    for key, layer in sharded_layers(model):
        shape, found = table_shape(layer), tuple(getattr(state.get(key), "shape", ()))
        if key in state and found != shape:
            raise ValueError(
                f"`state_dict` must hold `{key}` whole, with the shape {shape}, but has {found}. "
                "Leave `state_dict` out, on all ranks, or take that of "
                "`accelerator.get_state_dict(engine)`, or call "
                "`tp_embed.integrations.deepspeed.export(engine, directory)`."
            )


def _check_gatherable(model: Module) -> None:
    """Checks that nothing but our layers is cut, which only an engine can put together."""
    ours = {layer.weight for _, layer in sharded_layers(model)}
    for name, parameter in model.named_parameters():
        is_cut = getattr(parameter, "tensor_model_parallel", False) and parameter not in ours
        if is_cut or hasattr(parameter, "ds_id"):
            raise ValueError(
                "`model` must have no Parameters but its tables cut over ranks, but DeepSpeed has "
                f"cut `{name}`. Call `tp_embed.integrations.deepspeed.export(engine, directory)`, "
                "or pass `state_dict=accelerator.get_state_dict(engine)`, on all ranks."
            )
