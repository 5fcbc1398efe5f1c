"""Reads and lays out the files ``*.distcp`` of ``torch.distributed.checkpoint``: concatenated
``torch.save()`` files, each with a chunk of a tensor or another value.

See ``FileSystemWriter`` and ``FileSystemReader`` in torch.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files.arrays import Array, Index, Joined, Span, Tile, View
from ...files.text_files import inside
from ...files.torch_file import TorchFile, placeholder
from . import metadata
from .metadata import BytesItem, Chunk, Place, TensorItem

# Torch loads one chunk at a time.
_CHUNK_BYTES = 512 * 2**20
_FILE_BYTES = 4 * 2**30
# The bytes before a tensor's values are fewer.
_HEAD_BYTES = 4096
# Lists of names have a few MB.
_VALUE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Form:
    """How a chunk is stored: ``head`` comes before its ``size`` values."""

    head: bytes
    size: int
    dtype: torch.dtype
    shape: Index
    strides: Index
    offset: int

    def array(self, path: Path, first: int) -> Array:
        flat = Span(path, first + len(self.head), self.size, self.dtype)
        return View(flat, self.shape, strides=self.strides, offset=self.offset)


class Files:
    """The files of a directory, for reading.

    :param allow_unsafe: run the code in pickled values.
    """

    def __init__(self, directory: Path, *, allow_unsafe: bool = False) -> None:
        self._directory = directory
        self._allow_unsafe = allow_unsafe
        self._sizes: dict[str, tuple[Path, int]] = {}
        self._forms: dict[int, list[_Form]] = {}
        self._values: dict[bytes, Any] = {}

    @property
    def used(self) -> tuple[Path, ...]:
        """The files read so far."""
        return tuple(path for path, _ in self._sizes.values())

    def tensor(self, name: str, item: TensorItem) -> Array:
        """Returns the tensor ``name``, assembled from its chunks.

        :raises CheckpointError: a chunk is missing or has another shape, or chunks leave gaps.
        """
        tiles = []
        for chunk in item.chunks:
            if chunk.place.length == prod(chunk.shape) * item.dtype.itemsize:
                raise CheckpointError(
                    f"`{name}` in `{self._directory}` must be stored by `torch.save()`, but is in "
                    "the format of safetensors. Read its files as such, or save it with "
                    "`SerializationFormat.TORCH_SAVE`."
                )
            array = self._chunk(chunk.place)
            if array.shape != chunk.shape or array.dtype != item.dtype:
                raise CheckpointError(
                    f"The chunk of `{name}` from {chunk.start} on must be of shape {chunk.shape} "
                    f"and {item.dtype}, but the one in `{chunk.place.file}` is of {array.shape} "
                    f"and {array.dtype}. `{self._directory}` is damaged: copy it again."
                )
            tiles.append(Tile.whole(chunk.start, array))
        try:
            joined = Joined(item.shape, item.dtype, tiles)
        except CheckpointError as e:
            raise CheckpointError(f"`{name}` in `{self._directory}` is damaged. {e}") from e
        return tiles[0].array if len(tiles) == 1 else joined

    def value(self, item: BytesItem) -> Any:
        """Loads a value that is no tensor, with the tensors in it.

        :raises UnsafeCheckpointError: unpickling it would import classes.
        """
        path = self._check(item.place)
        if item.place.length > _VALUE_BYTES:
            raise CheckpointError(
                f"`{path}` must hold a small value at {item.place.offset}, but it has "
                f"{item.place.length} bytes."
            )
        data = _read(path, item.place.offset, item.place.length)
        if data not in self._values:
            window = (item.place.offset, item.place.length)
            file = TorchFile(path, window=window, allow_unsafe=self._allow_unsafe)
            try:
                self._values[data] = _loaded(file, file.root)
            except RecursionError as e:
                raise CheckpointError(f"`{path}` must not hold lists in themselves.") from e
        return self._values[data]

    def _chunk(self, place: Place) -> Array:
        """Returns the tensor at ``place``. Caches the parsed bytes before its values: parsing is
        slow, and they are equal for all chunks of one shape."""
        path = self._check(place)
        head = _read(path, place.offset, min(place.length, _HEAD_BYTES))
        for form in self._forms.setdefault(place.length, []):
            if head.startswith(form.head):
                return form.array(path, place.offset)
        file = TorchFile(path, window=(place.offset, place.length))
        tensor = file.root
        if type(tensor) is not Tensor:
            raise CheckpointError(
                f"`{path}` must hold a tensor at {place.offset}, but holds a "
                f"{type(tensor).__name__}."
            )
        array = file.array(tensor)
        if tensor.numel():
            match file.place(tensor):
                case (int(begin), *_) if begin < len(head):
                    form = _Form(
                        head[:begin],
                        tensor.untyped_storage().nbytes() // tensor.element_size(),
                        tensor.dtype,
                        tuple(tensor.shape),
                        tuple(tensor.stride()),
                        int(tensor.storage_offset()),
                    )
                    self._forms[place.length].append(form)
        return array

    def _check(self, place: Place) -> Path:
        """Returns the file of ``place``. Checks its length."""
        if place.file not in self._sizes:
            named_by = self._directory / metadata.NAME
            path = inside(self._directory, place.file, named_by)
            self._sizes[place.file] = path, path.stat().st_size
        path, size = self._sizes[place.file]
        if place.offset < 0 or place.length <= 0 or place.offset + place.length > size:
            raise CheckpointError(
                f"`{path}` must have {place.length} bytes from {place.offset} on, but has {size} "
                "bytes. It is truncated: copy it again."
            )
        return path


class Layout:
    """New files in a directory, with space for chunks of tensors. A context manager.

    :param rank: the rank that writes the files, for their names.
    """

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self._directory, self._rank = directory, rank
        self._count = 0
        self._end = _FILE_BYTES  # The first write opens a file.
        self._file: io.BufferedWriter | None = None
        self._archive = directory / f"archive{rank}.layout"
        self._ends: dict[tuple[Index, torch.dtype], tuple[bytes, bytes]] = {}

    def __enter__(self) -> Layout:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._archive.unlink(missing_ok=True)

    def space(self, shape: Index, dtype: torch.dtype) -> TensorItem:
        """Reserves space for a tensor, in chunks of rows."""
        return TensorItem(
            dtype,
            shape,
            tuple(Chunk(start, box, self._space(box, dtype)) for start, box in _rows(shape, dtype)),
        )

    def tensor(self, tensor: Tensor) -> TensorItem:
        """Writes a small tensor."""
        chunk = Chunk((0,) * tensor.dim(), tuple(tensor.shape), self.value(tensor).place)
        return TensorItem(tensor.dtype, tuple(tensor.shape), (chunk,))

    def value(self, value: Any) -> BytesItem:
        data = io.BytesIO()
        torch.save(value, data)
        return BytesItem(self._write(data.getvalue(), 0, b""))

    def _space(self, shape: Index, dtype: torch.dtype) -> Place:
        if (shape, dtype) not in self._ends:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(placeholder(shape, dtype), self._archive)
            file = TorchFile(self._archive)
            size = self._archive.stat().st_size
            begin, nbytes = 0, prod(shape) * dtype.itemsize
            match file.place(file.root):
                case (int(found), *_):
                    begin = found
            self._ends[shape, dtype] = (
                _read(self._archive, 0, begin),
                _read(self._archive, begin + nbytes, size - begin - nbytes),
            )
        head, tail = self._ends[shape, dtype]
        return self._write(head, prod(shape) * dtype.itemsize, tail)

    def _write(self, head: bytes, space: int, tail: bytes) -> Place:
        if self._end >= _FILE_BYTES or self._file is None:
            if self._file is not None:
                self._file.close()
            # Torch's names.
            name = f"__{self._rank}_{self._count}.distcp"
            self._file = (self._directory / name).open("wb")
            self._count, self._end = self._count + 1, 0
        self._file.seek(self._end)
        self._file.write(head)
        self._file.seek(space, os.SEEK_CUR)
        self._file.write(tail)
        first, self._end = self._end, self._file.tell()
        return Place(Path(self._file.name).name, first, self._end - first)


def _rows(shape: Index, dtype: torch.dtype) -> Iterator[tuple[Index, Index]]:
    """Yields the first index and the shape of each chunk of a tensor."""
    if not shape or not prod(shape):
        yield (0,) * len(shape), shape
        return
    count = max(1, _CHUNK_BYTES // (prod(shape[1:]) * dtype.itemsize))
    for first in range(0, shape[0], count):
        rows = min(count, shape[0] - first)
        yield (first, *(0 for _ in shape[1:])), (rows, *shape[1:])


def _loaded(file: TorchFile, value: Any) -> Any:
    """Loads the tensors in ``value``, a part of ``file``."""
    if isinstance(value, Tensor):
        return file.value(value)
    if type(value) in (list, tuple):
        return type(value)(_loaded(file, each) for each in value)
    if isinstance(value, dict):
        return {key: _loaded(file, each) for key, each in value.items()}
    return value


def _read(path: Path, first: int, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, first)
