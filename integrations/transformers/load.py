"""`from_pretrained()` straight into shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, WeightConverter, dot_natural_key
from transformers.integrations import is_deepspeed_zero3_enabled

from tp_embed.gang import Gang, GangError
from tp_embed.gang.agreement import raise_together
from tp_embed.gang.redistribute import redistribute
from tp_embed.nn.head import ShardedLayer
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition
from tp_embed.surgery.shard import shard_embeddings

from . import loss
from .layers import sharded_layers, table_shape

# The size of the part of a file in memory at a time.
_CHUNK_BYTES = 16 << 20


def from_pretrained(
    model_class: Any,
    name_or_path: str,
    gang: Gang,
    *args: Any,
    sharding: Mapping[str, Any] | None = None,
    fuse_loss: Literal["always", True, False] = False,
    **options: Any,
) -> Any:
    """Does what ``model_class.from_pretrained(name_or_path, *args, **options)`` followed by
    :func:`tp_embed.shard_embeddings` does, but each rank reads only its shards of the tables. A
    rank holds these, the rest of the model, and 16 MiB per reading thread.

    Builds the model on meta and shards its tables there. Then transformers loads it like a model
    with a tensor-parallel plan, and handles keys, dtypes and ties. All ranks must call it.

    :param model_class: a model of transformers, or one of its ``Auto`` classes.
    :param gang: the tensor-parallel gang, such as ``DeepSpeedGang.from_groups(tp_size=8)``.
    :param sharding: options of :func:`tp_embed.shard_embeddings`.
    :param fuse_loss: whether to call :func:`fuse_loss` of the model; ``"always"`` for evaluation,
        too.
    :param options: options of ``from_pretrained()``.
    :raises ValueError: the checkpoint is not in safetensors or lacks a table; an option makes
        transformers cut or quantize the model itself; or a config with ZeRO 3 is active, which
        would make transformers partition the model while building it.
    :raises GangError: another rank has failed, for example because it did not find the checkpoint.
    """
    meeting = _Meeting(gang)
    try:
        _check_options(options, dict(sharding or {}))
        base = _model_class(model_class, name_or_path, options)
        loading = _loading(base, gang, dict(sharding or {}), meeting)
        model = loading.from_pretrained(name_or_path, *args, **options)
        if fuse_loss:
            loss.fuse_loss(model, in_evaluation=fuse_loss == "always")
    except Exception as e:
        meeting.cancel(e)
        raise
    meeting.hold()
    return model


class _Meeting:
    """Makes ranks wait for each other before sharding and after loading: a rank that did not find
    the checkpoint on its node would leave the others in a collective."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang
        self.is_next = True  # Whether there is a meeting before the next collective.

    def hold(self, error: str | None = None) -> None:
        """
        :raises ValueError: this rank passed an ``error``.
        :raises GangError: another rank did.
        """

        def fail() -> None:
            if error is not None:
                raise ValueError(error)

        self.is_next = False
        raise_together(self._gang, fail)

    def cancel(self, error: Exception) -> None:
        """Tells the others why this rank does not come."""
        if self.is_next:
            with suppress(ValueError, GangError):
                self.hold(f"{type(error).__name__}: {error}")


def _check_options(options: dict[str, Any], sharding: dict[str, Any]) -> None:
    for name in ("distributed_config", "gguf_file", "quantization_config", "tp_plan", "tp_size"):
        if options.get(name) is not None:
            raise ValueError(
                f"`{name}` must be left out, since the model is about to be sharded by `gang`, "
                f"but is {options[name]!r}."
            )
    if "init_fn" in sharding:
        raise ValueError("`sharding` must not have an `init_fn`: tables come from the checkpoint.")
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "`from_pretrained` must be called before a DeepSpeed config with ZeRO 3 becomes active "
            "(by `TrainingArguments`, `HfDeepSpeedConfig` or an `Accelerator`), but one is. Move "
            "it up; ZeRO 3 partitions the model when its engine is built."
        )


def _model_class(model_class: Any, name_or_path: str, options: dict[str, Any]) -> Any:
    """Returns the class of the model, resolving ``Auto`` classes."""
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    if options.get("config") is None:
        found = ("cache_dir", "revision", "token", "trust_remote_code", "local_files_only")
        known = {name: options[name] for name in found if name in options}
        options["config"] = AutoConfig.from_pretrained(name_or_path, **known)
    options.pop("trust_remote_code", None)
    kind = type(options["config"])
    if kind not in getattr(model_class, "_model_mapping", {}):
        raise TypeError(
            f"`model_class` must be a `PreTrainedModel`, or an `Auto` class that knows a "
            f"`{kind.__name__}`, but is {model_class!r} instead. Name the class of the model."
        )
    found_class = model_class._model_mapping[kind]
    return found_class[0] if isinstance(found_class, (list, tuple)) else found_class


def _loading(base: Any, gang: Gang, sharding: dict[str, Any], meeting: _Meeting) -> Any:
    """Returns a subclass of ``base`` that shards tables before loading them."""

    def load(
        model: Any,
        state_dict: Any,
        files: list[str] | None,
        load_config: Any,
        *args: Any,
        **more: Any,
    ) -> Any:
        if (
            state_dict is not None
            or not files
            or not all(f.endswith(".safetensors") for f in files)
        ):
            raise ValueError(
                f"The checkpoint must be in safetensors, which can be read in slices, but has "
                f"{files}. Convert it: `tp-embed convert SOURCE OUTPUT --to hf`."
            )
        meeting.hold()
        model.__class__ = base
        model.tie_weights(recompute_mapping=False)  # Sharding depends on ties.
        shard_embeddings(model, gang, **sharding)
        meeting.is_next = True
        _as_dtensors(model)
        state: dict[str, Any] = {key: _Slices(file, key) for file in files for key in _keys(file)}
        _join_rows(model, state, load_config.weight_mapping or ())
        return base._load_pretrained_model(model, state, files, load_config, *args, **more)

    def finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        missing = set(loading_info.missing_keys)
        info = base._finalize_model_loading(model, load_config, loading_info)
        _check_found(model, missing)
        _as_shards(model)
        return info

    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_load_pretrained_model": staticmethod(load),
        "_finalize_model_loading": staticmethod(finalize),
    }
    return type(base.__name__, (base,), attributes)


def _join_rows(model: Any, state: dict[str, Any], mapping: Iterable[Any]) -> None:
    """Joins what the files hold of a table in several tensors of rows, as those of Qwen4-Exp do, if
    each rank holds rows of it: transformers would cut each tensor, and join what it has cut."""
    tables = [key for key, layer in sharded_layers(model) if layer.shard_dim == 0]
    for converter in mapping:
        operations = converter.operations if isinstance(converter, WeightConverter) else []
        joins = [op for op in operations if isinstance(op, Concatenate) and op.dim == 0]
        target = converter.target_patterns[0]
        if not (joins == operations and any(key.endswith(target) for key in tables)):
            continue
        parts: dict[str, list[_Slices]] = {}
        for key in sorted(state, key=dot_natural_key):
            whole, pattern = converter.rename_source_key(key)
            if pattern is not None:
                parts.setdefault(whole, []).append(state.pop(key))
        state |= {whole: _Rows(found) for whole, found in parts.items()}


def _as_dtensors(model: Any) -> None:
    """Replaces weights of tables by DTensors, which transformers reads slices for."""
    shown: dict[Tensor, Parameter] = {}
    for _, layer in sharded_layers(model):
        if layer.gang.size > 1 and layer.weight not in shown:
            mesh = DeviceMesh.from_group(layer.gang.as_process_group(), layer.gang.device.type)
            shape = table_shape(layer)
            tensor = DTensor.from_local(
                local(layer.weight),
                mesh,
                [Shard(layer.shard_dim)],
                run_check=False,
                shape=torch.Size(shape),
                stride=(shape[1], 1),
            )
            shown[layer.weight] = Parameter(tensor, layer.weight.requires_grad)
    _replace(model, shown)


def _as_shards(model: Any) -> None:
    shards: dict[Tensor, Parameter] = {}
    for _, layer in sharded_layers(model):
        weight, own = layer.weight, layer.partition
        if isinstance(weight, DTensor) and weight not in shards:
            shard = weight.to_local().detach()
            if own.cyclic:  # A DTensor has blocks.
                shard = redistribute(shard, Partition(own.size, own.num_shards), own, layer.gang)
            shards[weight] = Parameter(shard, weight.requires_grad)
    _replace(model, shards)


def _replace(model: Any, new: dict[Tensor, Parameter]) -> None:
    layers: dict[ShardedLayer, None] = dict.fromkeys(layer for _, layer in sharded_layers(model))
    for layer in layers:
        layer.weight = new.get(layer.weight, layer.weight)
        layer.gang.adopt(layer)


def _check_found(model: Any, missing: set[str]) -> None:
    """Checks that the checkpoint had each table, by one of its names if tied."""
    found = {layer.weight for key, layer in sharded_layers(model) if key not in missing}
    lacking = [key for key, layer in sharded_layers(model) if layer.weight not in found]
    if lacking:
        raise ValueError(
            f"The checkpoint must hold the tables of the model, but lacks {lacking}. Load it by "
            "`from_pretrained()` of the class, which draws them, and call `shard_embeddings()`."
        )


def _keys(file: str) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


class _Slices:
    """Reads slices of a tensor in a safetensors file. Maps the file again for each chunk of rows,
    so that pages already read can leave memory."""

    def __init__(self, file: str, key: str) -> None:
        self._open = partial(safe_open, file, framework="pt")
        self._key = key

    def get_shape(self) -> list[int]:
        with self._open() as file:
            return list(file.get_slice(self._key).get_shape())

    def get_dtype(self) -> str:
        with self._open() as file:
            return str(file.get_slice(self._key).get_dtype())

    def __getitem__(self, index: Any) -> Tensor:
        shape = self.get_shape()
        if not shape:
            return self._read().clone()
        given = () if index is Ellipsis else tuple(index)
        whole = (slice(None),) * (len(shape) - len(given))
        parts = [part.indices(size) for part, size in zip(given + whole, shape, strict=True)]
        start, stop, _ = parts[0]
        rest = [slice(first, last) for first, last, _ in parts[1:]]
        empty = self._read(slice(0, 0), *rest)
        output = empty.new_empty((stop - start, *empty.shape[1:]))
        # Mapped for a row: the bytes of all columns.
        row_bytes = max(1, output.itemsize * math.prod(shape[1:]))
        step = max(1, _CHUNK_BYTES // row_bytes)
        for row in range(start, stop if output.numel() else start, step):
            last = min(row + step, stop)
            output[row - start : last - start] = self._read(slice(row, last), *rest)
        return output

    def _read(self, *index: slice) -> Tensor:
        with self._open() as file:
            if not index:
                return cast(Tensor, file.get_tensor(self._key))
            return cast(Tensor, file.get_slice(self._key)[index])


class _Rows:
    """Reads slices of tensors that lie one below the other in a table."""

    def __init__(self, parts: list[_Slices]) -> None:
        self._parts = parts
        self._sizes = [part.get_shape()[0] for part in parts]

    def get_shape(self) -> list[int]:
        return [sum(self._sizes), *self._parts[0].get_shape()[1:]]

    def get_dtype(self) -> str:
        return self._parts[0].get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        first, *rest = (slice(None),) if index is Ellipsis else tuple(index)
        start, stop, _ = first.indices(sum(self._sizes))
        empty = self._parts[0][(slice(0, 0), *rest)]
        output = empty.new_empty((stop - start, *empty.shape[1:]))
        for part, size in zip(self._parts, self._sizes, strict=True):
            rows = range(max(0, start), min(size, stop))
            if rows:
                own = output[rows.start - start : rows.stop - start]
                own.copy_(part[(slice(rows.start, rows.stop), *rest)])
            start, stop = start - size, stop - size
        return output
