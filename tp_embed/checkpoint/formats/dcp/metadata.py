"""Reads and writes the file ``.metadata`` of ``torch.distributed.checkpoint``, the index of its
files.

It is a pickle of ``torch.distributed.checkpoint.metadata.Metadata``. Unpickles only the torch
dataclasses that belong in it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tp_embed._torch_private import dcp_storage_info

from ...errors import CheckpointError, asks_to_import, shown
from ...files.arrays import Index

NAME = ".metadata"
_MAX_DEPTH = 100
# The path to a value in nested dicts and lists.
Keys = tuple[str | int, ...]


class Place(NamedTuple):
    """A byte range in a file of the directory."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of ``shape`` at ``start`` in a tensor."""

    start: Index
    shape: Index
    place: Place


@dataclass(frozen=True)
class TensorItem:
    """A tensor: its dtype, its shape, and the chunks that make it up."""

    dtype: torch.dtype
    shape: Index
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class BytesItem:
    """Another value, written by ``torch.save()``."""

    place: Place


Item = TensorItem | BytesItem


def read(path: Path, *, allow_unsafe: bool = False) -> tuple[dict[str, Item], dict[str, Keys]]:
    """Returns the items of a checkpoint by flat name, and the paths of items in nested dicts and
    lists.

    :param allow_unsafe: import other classes that the file names.
    :raises CheckpointError: the file is damaged, or in another format.
    :raises UnsafeCheckpointError: the file names other classes.
    """
    from torch.distributed.checkpoint.metadata import Metadata  # takes a second

    match _load(path, allow_unsafe):
        case Metadata(
            state_dict_metadata=dict(described), storage_data=dict(stored), planner_data=keys
        ):
            storage = dict(_stored(path, index, info) for index, info in stored.items())
            if len(storage) != len(stored):
                raise CheckpointError(f"`{path}` must not give a chunk two places, but does.")
            items = {_name(path, k): _item(path, k, v, storage) for k, v in described.items()}
            return items, _nesting(path, keys, items)
    raise CheckpointError(
        f"`{path}` must hold the metadata of tensors and where they are stored, but does not."
    )


def write(path: Path, items: Mapping[str, Item], nesting: Mapping[str, Keys]) -> None:
    """Writes the file that :func:`read` reads, atomically."""
    from torch.distributed.checkpoint import filesystem, metadata  # takes a second

    storage_info = dcp_storage_info()
    described: dict[str, Any] = {}
    stored: dict[metadata.MetadataIndex, Any] = {}
    for name, item in items.items():
        if isinstance(item, BytesItem):
            described[name] = metadata.BytesStorageMetadata()
            stored[metadata.MetadataIndex(name)] = storage_info(*item.place)
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
            stored[index] = storage_info(*chunk.place)
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


def _load(path: Path, allow_unsafe: bool) -> Any:
    data = path.read_bytes()
    unpickler = _Unpickler(io.BytesIO(data), allow_unsafe)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # Python allocates a memo that is as long as the largest index in the file.
            if "PUT" in opcode.name and argument not in range(len(data)):
                raise ValueError(f"the memo has no {argument}")
        value = unpickler.load()
    except Exception as e:  # A damaged file may raise anything.
        if not unpickler.refused:
            raise CheckpointError(
                f"`{path}` must be a pickle of plain values, but cannot be read: "
                f"{type(e).__name__}: {e}. Copy it again."
            ) from e
    if unpickler.refused:
        raise asks_to_import(path, sorted(unpickler.refused))
    return value


class _Unpickler(pickle.Unpickler):
    """Finds allowed classes and dtypes. Collects all other names in ``refused``."""

    def __init__(self, file: io.BytesIO, allow_unsafe: bool) -> None:
        super().__init__(file)
        # A pickle can set attributes of the classes it names, so it gets subclasses made for it.
        self._ignored = type("Ignored", (_Ignored,), {})
        self._allowed = {
            name: each if each is tuple else type(each.__name__, (each,), {})
            for name, each in _allowed().items()
        }
        self._allow_unsafe = allow_unsafe
        self.refused: set[str] = set()

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if (module, name) in _IGNORED:
            return self._ignored
        if self._allow_unsafe:
            return super().find_class(module, name)
        self.refused.add(f"{module}.{name}")
        return self._ignored  # Continue, to collect all refused names. The result isn't used.


class _Ignored:
    """Takes any arguments and state, and drops them."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_MODULE = "torch.distributed.checkpoint.metadata"
# Some are here in torch 2.2 and older.
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"
_IGNORED = {
    (_MODULE, "StorageMeta"),
    (_MODULE, "_MEM_FORMAT_ENCODING"),
    (_OLD_MODULE, "MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


def _allowed() -> dict[tuple[str, str], type]:
    from torch.distributed.checkpoint import metadata  # takes a second

    class Properties(metadata.TensorProperties):
        def __setstate__(self, state: Any) -> None:  # Torch's own checks what is ignored here.
            self.dtype = state["dtype"] if isinstance(state, dict) else state[0]

    return {
        (_MODULE, "Metadata"): metadata.Metadata,
        (_MODULE, "TensorStorageMetadata"): metadata.TensorStorageMetadata,
        (_MODULE, "TensorProperties"): Properties,
        (_OLD_MODULE, "TensorProperties"): Properties,
        (_MODULE, "ChunkStorageMetadata"): metadata.ChunkStorageMetadata,
        (_MODULE, "BytesStorageMetadata"): metadata.BytesStorageMetadata,
        (_MODULE, "MetadataIndex"): metadata.MetadataIndex,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): dcp_storage_info(),
        ("torch", "Size"): tuple,
    }


def _stored(path: Path, index: Any, info: Any) -> tuple[tuple[str, Index | None], Place]:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    StorageInfo = dcp_storage_info()  # noqa: N806
    match info:
        case StorageInfo(transform_descriptors=transforms) if transforms:
            raise CheckpointError(
                f"The items in `{path}` must be stored unchanged, but are transformed by "
                f"{shown(transforms)}. Load them with torch and save them without."
            )
    match index, info:
        case (
            MetadataIndex(fqn=str(name), offset=start),
            StorageInfo(relative_path=str(file), offset=int(offset), length=int(length)),
        ) if start is None or _is_index(start):
            return (name, start), Place(file, offset, length)
    raise CheckpointError(
        f"`{path}` must say of each item the file, an offset and a length, but says "
        f"{shown(info)}. It is damaged: copy it again."
    )


def _item(
    path: Path, name: str, item: Any, storage: Mapping[tuple[str, Index | None], Place]
) -> Item:
    from torch.distributed.checkpoint import metadata

    match item:
        case metadata.BytesStorageMetadata():
            return BytesItem(_place(path, name, None, storage))
        case metadata.TensorStorageMetadata(
            properties=metadata.TensorProperties(dtype=torch.dtype() as dtype),
            size=tuple(size),
            chunks=list(parts),
        ) if _is_index(size):
            chunks = []
            for part in parts:
                match part:
                    case metadata.ChunkStorageMetadata(
                        offsets=tuple(start), sizes=tuple(shape)
                    ) if (
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
    if not isinstance(keys, dict):  # Planners that do not flatten save none, or something else.
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
