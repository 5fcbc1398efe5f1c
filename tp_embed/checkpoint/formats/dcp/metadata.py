"""The file ``.metadata`` of ``torch.distributed.checkpoint``: what is in which file.

It is a pickle of ``torch.distributed.checkpoint.metadata.Metadata``. It is read without importing
any class: each that belongs in it has a stand-in here that keeps what it is given.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import CheckpointError, shown
from ...files.arrays import Index
from ...files.plain_pickle import StandIn
from ...files.plain_pickle import load as load_pickle

NAME = ".metadata"
_MAX_DEPTH = 100
# The keys that lead to a value in nested dicts and lists.
Keys = tuple[str | int, ...]


class Place(NamedTuple):
    """Bytes of a file of the directory."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor, at ``start`` in it."""

    start: Index
    shape: Index
    place: Place


@dataclass(frozen=True)
class TensorItem:
    dtype: torch.dtype
    shape: Index
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class BytesItem:
    """Something else, as ``torch.save()`` writes it."""

    place: Place


Item = TensorItem | BytesItem


class _Metadata(StandIn):
    pass


class _Tensor(StandIn):
    pass


class _Properties(StandIn):
    pass


class _Chunk(StandIn):
    pass


class _Bytes(StandIn):
    pass


class _Index(StandIn):
    pass


class _Storage(StandIn):
    pass


_MODULE = "torch.distributed.checkpoint.metadata"
# Where torch 2.2 and older have some of them.
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"
_STAND_INS: Mapping[tuple[str, str], type] = {
    (_MODULE, "Metadata"): _Metadata,
    (_MODULE, "TensorStorageMetadata"): _Tensor,
    (_MODULE, "TensorProperties"): _Properties,
    (_OLD_MODULE, "TensorProperties"): _Properties,
    (_MODULE, "ChunkStorageMetadata"): _Chunk,
    (_MODULE, "BytesStorageMetadata"): _Bytes,
    (_MODULE, "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Storage,
    ("torch", "Size"): tuple,
    # What is not looked at.
    (_MODULE, "StorageMeta"): StandIn,
    (_MODULE, "_MEM_FORMAT_ENCODING"): StandIn,
    (_OLD_MODULE, "MEM_FORMAT_ENCODING"): StandIn,
    ("torch.serialization", "_get_layout"): StandIn,
    ("pathlib", "PosixPath"): StandIn,
    ("pathlib", "WindowsPath"): StandIn,
    ("pathlib._local", "PosixPath"): StandIn,
    ("pathlib._local", "WindowsPath"): StandIn,
}


def read(path: Path, *, allow_unsafe: bool = False) -> tuple[dict[str, Item], dict[str, Keys]]:
    """The items of a checkpoint by their flat names, and of those that were in nested dicts and
    lists the keys that lead there.

    :param allow_unsafe: import the other classes that the file asks for.
    :raises CheckpointError: it is no such file, or a damaged one.
    :raises UnsafeCheckpointError: it asks for other classes.
    """
    root = load_pickle(path, _STAND_INS, allow_unsafe=allow_unsafe)
    match root:
        case _Metadata(
            fields={"state_dict_metadata": dict(described), "storage_data": dict(stored)}
        ):
            storage = dict(_stored(path, index, info) for index, info in stored.items())
            if len(storage) != len(stored):
                raise CheckpointError(f"`{path}` must not give a chunk two places, but does.")
            items = {_name(path, k): _item(path, k, v, storage) for k, v in described.items()}
            keys = root.fields.get("planner_data")
            return items, _nesting(path, keys, items)
    raise CheckpointError(
        f"`{path}` must hold the metadata of tensors and where they are stored, but does not."
    )


def write(path: Path, items: Mapping[str, Item], nesting: Mapping[str, Keys]) -> None:
    """Writes what :func:`read` reads, at one moment."""
    from torch.distributed.checkpoint import filesystem, metadata  # takes a second

    described: dict[str, Any] = {}
    stored: dict[metadata.MetadataIndex, Any] = {}
    for name, item in items.items():
        if isinstance(item, BytesItem):
            described[name] = metadata.BytesStorageMetadata()
            stored[metadata.MetadataIndex(name)] = filesystem._StorageInfo(*item.place)
            continue
        described[name] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=item.dtype),
            torch.Size(item.shape),
            [
                metadata.ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape))
                for chunk in item.chunks
            ],
        )
        for number, chunk in enumerate(item.chunks):
            index = metadata.MetadataIndex(name, chunk.start, number)
            stored[index] = filesystem._StorageInfo(*chunk.place)
    root = metadata.Metadata(
        described,
        planner_data=dict(nesting),
        storage_data=stored,
        storage_meta=metadata.StorageMeta(),
        version=filesystem.CURRENT_DCP_VERSION,
    )
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        pickle.dump(root, file)
    temporary.replace(path)


def _stored(path: Path, index: Any, info: Any) -> tuple[tuple[str, Index | None], Place]:
    match index, info:
        case _Index(fields=dict(key)), _Storage(fields=dict(place)):
            match place:
                case {"transform_descriptors": transforms} if transforms:
                    raise CheckpointError(
                        f"What `{path}` describes must be stored as it is, but is transformed by "
                        f"{shown(transforms)}. Load it with torch and save it without."
                    )
                case {"relative_path": str(file), "offset": int(offset), "length": int(length)}:
                    start = key.get("offset")
                    found = Place(file, offset, length)
                    name = key.get("fqn")
                    if isinstance(name, str) and (start is None or _is_index(start)):
                        return (name, start), found
    raise CheckpointError(
        f"`{path}` must say of each item the file, an offset and a length, but says "
        f"{str(getattr(info, 'fields', info))[:200]}. It is damaged: copy it again."
    )


def _item(
    path: Path, name: str, item: Any, storage: Mapping[tuple[str, Index | None], Place]
) -> Item:
    match item:
        case _Bytes():
            return BytesItem(_place(path, name, None, storage))
        case _Tensor(
            fields={
                "properties": _Properties(
                    fields=(torch.dtype() as dtype, *_) | {"dtype": torch.dtype() as dtype}
                ),
                "size": tuple(size),
                "chunks": list(parts),
            }
        ) if _is_index(size):
            chunks = []
            for part in parts:
                match part:
                    case _Chunk(fields={"offsets": tuple(start), "sizes": tuple(shape)}) if (
                        _is_index(start)
                        and _is_index(shape)
                        and len(start) == len(shape) == len(size)
                    ):
                        if 0 not in shape:  # Empty shards of several ranks share a place.
                            chunks.append(Chunk(start, shape, _place(path, name, start, storage)))
                    case _:
                        break
            else:
                return TensorItem(dtype, size, tuple(chunks))
    raise CheckpointError(
        f"`{path}` must give `{name}` a dtype, a shape and chunks with offsets and sizes, but "
        "does not. It is damaged: copy it again."
    )


def _place(
    path: Path,
    name: str,
    start: Index | None,
    storage: Mapping[tuple[str, Index | None], Place],
) -> Place:
    if (name, start) not in storage:
        where = "" if start is None else f" from {start} on"
        raise CheckpointError(
            f"`{path}` must say where `{name}`{where} is stored, but does not. It is damaged: "
            "copy it again."
        )
    return storage[name, start]


def _nesting(path: Path, keys: Any, items: Mapping[str, Item]) -> dict[str, Keys]:
    if not isinstance(keys, dict):  # A planner that does not flatten has none, or others have more.
        return {}
    found = {name: keys[name] for name in items if name in keys}
    for name, each in found.items():
        is_path = isinstance(each, tuple) and 0 < len(each) <= _MAX_DEPTH
        if not is_path or not all(type(key) in (str, int) for key in each):
            raise CheckpointError(
                f"`{path}` must say which keys lead to `{name}`, but says {shown(each)}. It is "
                "damaged: copy it again."
            )
    return found


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"`{path}` must name items by strings, but by {shown(name)}.")
    return name


def _is_index(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(each) is int and each >= 0 for each in value)
