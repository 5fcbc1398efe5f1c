"""Writes the whole model of an engine in the layout of Hugging Face.

DeepSpeed's ``save_16bit_model()`` writes the part of one tensor-parallel rank at ZeRO 0 to 2, and
gathers the whole model on one rank at ZeRO 3.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeGuard, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.nn import Module, Parameter

from tp_embed.checkpoint.files import safetensors_file
from tp_embed.checkpoint.files.arrays import CHUNK_BYTES, Array
from tp_embed.checkpoint.staging import staged
from tp_embed.gang import Gang
from tp_embed.gang.agreement import raise_together
from tp_embed.gang.process_group import ProcessGroupGang
from tp_embed.gang.redistribute import move_rows
from tp_embed.nn.embedding import RowWiseEmbedding
from tp_embed.parameter.sharded import local
from tp_embed.partition import within

from .layout import has_mixed_up_masters, local_shape, logical_shape, map_of
from .private import (
    DS_TENSOR_MODEL_PARALLEL,
    bwc_tensor_model_parallel_group,
    is_moe_param,
    persistent_buffers,
)
from .table_optimizers import own_tables_of

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def export(
    engine: Any,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes the whole model of ``engine``, at any ZeRO stage and tensor-parallel size, as
    safetensors, so that ``from_pretrained(directory)`` loads it; models of transformers get a
    ``config.json``. Tied weights are written once.

    All ranks of the engine must call it. Gathers one Parameter at a time: over the data-parallel
    group if ZeRO partitions it, then by sends from its tensor-parallel group to rank 0, which
    writes it. A table that is sharded over all processes is gathered in blocks of 16 MiB.

    :param directory: the directory to write, on the file system of rank 0.
    :param dtype: the dtype to write; ``None`` keeps the dtypes of the Parameters. With
        ``torch.float32``, 16-bit Parameters are the optimizer's master weights, exactly.
    :param max_shard_size: the maximum size of a file in bytes; a larger Parameter gets a file of
        its own.
    :raises FileExistsError: ``directory`` already exists; a :class:`GangError` on other ranks.
    :raises ValueError: ``dtype`` is not supported; the model has pipeline stages, experts, or
        layers that cannot be gathered; or there are no master weights. Nothing has been written.
    """
    module = engine.module
    parameters = _parameters(module)
    _check(engine, parameters, dtype)
    tables, buffers = _tables_of_all(module), persistent_buffers(engine)
    layout = {
        name: (_shape(param, tables.get(param)), dtype or param.dtype)
        for name, param in parameters.items()
    }
    layout |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}
    sizes = {name: prod(shape) * kind.itemsize for name, (shape, kind) in layout.items()}
    files = _plan(sizes, max_shard_size)
    on_rank_0 = partial(_on_rank_0, ProcessGroupGang(None, engine.device))

    with _partitioned(engine), ExitStack() as stack:
        folder = on_rank_0(lambda: stack.enter_context(_staged_directory(directory)))
        arrays = on_rank_0(lambda: _lay_out(folder, files, layout))
        for name in layout:
            blocks: Iterable[tuple[int, Tensor | None]] = [(0, buffers.get(name))]
            if name in parameters:
                blocks = _blocks(engine, parameters[name], tables.get(parameters[name]), dtype)
            for first, values in blocks:
                on_rank_0(partial(_write, arrays, name, first, values))
        on_rank_0(partial(_write_index, folder, files, sizes))
        on_rank_0(partial(_write_config, folder, module, dtype))
        on_rank_0(stack.close)


@contextmanager
def _staged_directory(directory: str | Path) -> Iterator[Path]:
    with staged(Path(directory)) as stage:
        stage.path.mkdir()
        yield stage.path


def _parameters(module: Module) -> dict[str, Parameter]:
    """Returns the Parameters by the names that transformers saves them under."""
    tied: Iterable[str] = getattr(module, "all_tied_weights_keys", None) or ()
    names: dict[Parameter, str] = {}
    own = ((n, b) for n, b in module.named_buffers(remove_duplicate=False) if _is_own_table(b))
    for name, param in (*module.named_parameters(remove_duplicate=False), *own):
        if param not in names or (names[param] in tied and name not in tied):
            names[param] = name
    return {name: param for param, name in names.items()}


def _is_own_table(buffer: Tensor) -> TypeGuard[Parameter]:
    """Returns whether ``buffer`` is a table with an optimizer of its own."""
    return isinstance(buffer, Parameter)


def _check(engine: Any, parameters: Mapping[str, Parameter], dtype: torch.dtype | None) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {_DTYPES}, but is {dtype} instead.")
    if isinstance(engine.module, PipelineModule):
        raise ValueError(
            "`engine` must have a model without pipeline stages, but has a `PipelineModule`."
        )
    tables = _tables_of_all(engine.module)
    for name, param in parameters.items():
        if is_moe_param(param) and param not in tables:
            raise ValueError(
                f"`engine` must have a model without Parameters that differ between data-parallel "
                f"ranks, but `{name}` belongs to an expert."
            )
        if getattr(param, DS_TENSOR_MODEL_PARALLEL, False) and map_of(param) is None:
            raise ValueError(
                f"`{name}` must say how it is cut over the tensor-parallel ranks, as AutoTP's "
                "layers and ours do, but does not. Export the model with the library that cut it."
            )
        if _wants_master(param, dtype) and has_mixed_up_masters(engine):
            raise ValueError(
                f"`dtype` must be None or {param.dtype} with `round_robin_gradients`, where "
                "DeepSpeed takes the master weights of one Parameter for another's, but is "
                f"{dtype}."
            )
        if _wants_master(param, dtype) and engine.zero_optimization_stage() == 0:
            raise ValueError(
                f"`dtype` must be None or {param.dtype} at ZeRO 0, where the master weights cannot "
                f"be reached, but is {dtype}. Train at ZeRO 1."
            )


def _wants_master(param: Parameter, dtype: torch.dtype | None) -> bool:
    return dtype == torch.float32 and param.dtype != torch.float32 and param.requires_grad


def _plan(sizes: Mapping[str, int], max_shard_size: int) -> dict[str, list[str]]:
    """Assigns the names of tensors to files."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, start=1)
    }


@contextmanager
def _partitioned(engine: Any) -> Iterator[None]:
    """Partitions the Parameters that ZeRO 3 keeps gathered, as DeepSpeed does to save, and gathers
    them again."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    engine.optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        engine.optimizer.checkpoint_event_epilogue()


def _tables_of_all(module: Module) -> dict[Tensor, RowWiseEmbedding]:
    """Returns the tables that are sharded over other ranks than the tensor-parallel ones."""
    layers = (layer for layer in module.modules() if isinstance(layer, RowWiseEmbedding))
    return {layer.weight: layer for layer in layers if layer.gang.size > 1}


def _shape(param: Parameter, table: RowWiseEmbedding | None) -> tuple[int, ...]:
    """Returns the shape of the whole Parameter."""
    return logical_shape(param) if table is None else (table.num_embeddings, table.embed_dim)


def _blocks(
    engine: Any, param: Parameter, table: RowWiseEmbedding | None, dtype: torch.dtype | None
) -> Iterator[tuple[int, Tensor | None]]:
    """Yields the whole ``param`` on rank 0, in blocks of rows, each with its first row; ``None``
    elsewhere. All ranks must take all blocks."""
    if table is None:
        yield 0, _gather(engine, param, dtype)
        return
    own, wants_master = own_tables_of(engine), _wants_master(param, dtype)
    optimizer = own.optimizer_of(param) if own is not None and param in own else None
    master = _master(engine, param) if wants_master and optimizer is None else None
    shard, gang = local(param if master is None else master), cast(ProcessGroupGang, table.gang)
    held = [table.partition.shard(rank) for rank in range(gang.size)]
    rows = range(table.num_embeddings)
    count = max(1, CHUNK_BYTES // max(1, shard.size(1) * (dtype or shard.dtype).itemsize))
    for first in rows[::count]:
        block = rows[first : first + count]
        places = [within(each, block.start, block.stop) for each in held]
        parts = [each[place] for each, place in zip(held, places, strict=True)]
        own_rows = places[gang.rank]
        values = shard[own_rows]
        if wants_master and optimizer is not None:
            indices = torch.arange(own_rows.start, own_rows.stop, device=shard.device)
            values = optimizer.master(param, indices)
        wanted = [block if rank == 0 else block[:0] for rank in gang.global_ranks]
        values = move_rows(values, parts, wanted, gang)
        yield first, values.to(dtype or param.dtype) if dist.get_rank() == 0 else None


def _gather(engine: Any, param: Parameter, dtype: torch.dtype | None) -> Tensor | None:
    """Returns the whole ``param`` on the CPU of rank 0, ``None`` elsewhere. All ranks call it."""
    shard = _shard(engine, param, dtype)
    layout, group = map_of(param), bwc_tensor_model_parallel_group(engine.mpu)
    if layout is None or group is None:
        return shard.cpu() if dist.get_rank() == 0 else None
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:
        return None
    if dist.get_rank() != 0:
        if shard.numel():
            dist.send(shard, dst=0, group=group)
        return None
    shards = []
    for rank, shape in zip(ranks, layout.shards, strict=True):
        shards.append(shard if rank == 0 else shard.new_empty(shape))
        if rank != 0 and shards[-1].numel():
            dist.recv(shards[-1], src=rank, group=group)
    return layout.rebuild(shards).cpu()


@torch.no_grad()
def _shard(engine: Any, param: Parameter, dtype: torch.dtype | None) -> Tensor:
    """Returns this tensor-parallel rank's shard of ``param``, gathered over the data-parallel
    group."""
    master = _master(engine, param) if _wants_master(param, dtype) else None
    if master is not None:
        return local(master).reshape(local_shape(param)).contiguous()
    with deepspeed.zero.GatheredParameters([param]):
        return local(param).to(dtype or param.dtype, copy=True).contiguous()


def _master(engine: Any, param: Parameter) -> Tensor | None:
    own = own_tables_of(engine)
    if own is not None and param in own:
        return own.optimizer_of(param).master(param)
    found: Tensor | None = safe_get_full_fp32_param(param)
    return found


def _on_rank_0(world: Gang, action: Callable[[], Any]) -> Any:
    """Runs ``action`` on rank 0; if it fails, all ranks raise. All ranks call it."""
    return raise_together(world, lambda: action() if world.rank == 0 else None, "The export")


def _lay_out(
    folder: Path,
    files: Mapping[str, list[str]],
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> dict[str, Array]:
    """Makes the files, with space for all tensors."""
    arrays: dict[str, Array] = {}
    for file, names in files.items():
        # So that each is aligned to its element size.
        own = sorted(names, key=lambda name: -layout[name][1].itemsize)
        tensors = {name: layout[name] for name in own}
        arrays |= safetensors_file.lay_out(folder / file, tensors, {"format": "pt"})
    return arrays


def _write(arrays: Mapping[str, Array], name: str, first: int, values: Tensor | None) -> None:
    assert values is not None  # On rank 0.
    array = arrays[name]
    start = (first, *(0 for _ in array.shape[1:])) if array.shape else ()
    array.write(start, values.detach().cpu())


def _write_index(folder: Path, files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> None:
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_config(folder: Path, module: Module, dtype: torch.dtype | None) -> None:
    """Writes the configuration of a model of transformers, as ``save_pretrained()`` does."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    config.dtype = str(dtype or next(module.parameters()).dtype).removeprefix("torch.")
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)
    generation_config: Any = getattr(module, "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
