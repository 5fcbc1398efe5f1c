"""Reads and lays out safetensors files. Checks their headers; tensors stay in the files.

The package ``safetensors`` writes only tensors in memory. The format is described at
https://github.com/huggingface/safetensors: eight bytes with the size of the header, the header as
JSON, and the bytes of the tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, shown
from .arrays import Array, Index, Span, View
from .hashes import RunningHash
from .text_files import parse_json

# The limit of the package `safetensors`.
_MAX_HEADER = 100_000_000

_METADATA = "__metadata__"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read(path: Path, hashing: RunningHash | None = None) -> tuple[dict[str, Array], dict[str, str]]:
    """Returns the tensors of a file by name, and its metadata.

    :param hashing: hashes whatever is written to the tensors.
    :raises CheckpointError: the file is damaged, or in another format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"`{path}` must be a safetensors file, but its header would have {length} bytes, "
                f"and the file has {size}. It is truncated, or in another format."
            )
        header = parse_json(file.read(length), path)
    metadata = header.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"The metadata of `{path}` must be strings, but is not.")
    first = 8 + length
    arrays, end = {}, 0
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != end or stop - begin != prod(shape) * dtype.itemsize or first + stop > size:
            raise CheckpointError(
                f"`{name}` in `{path}` must have {prod(shape) * dtype.itemsize} bytes from {end} "
                f"on, out of {size - first}, but has those from {begin} to {stop}. "
                "The file is damaged: copy it again."
            )
        end = stop
        arrays[name] = View(Span(path, first + begin, prod(shape), dtype, hashing), shape)
    if first + end != size:
        raise CheckpointError(
            f"`{path}` must have {first + end} bytes, by its header, but has {size}. The file is "
            "damaged: copy it again."
        )
    return {name: arrays[name] for name in header}, metadata


def lay_out(
    path: Path,
    tensors: Mapping[str, tuple[Index, torch.dtype]],
    metadata: Mapping[str, str] | None = None,
    hashing: RunningHash | None = None,
) -> dict[str, Array]:
    """Writes a file with space for ``tensors``, given by their shapes and dtypes. Keeps an existing
    file: it was laid out by an earlier run.

    :param hashing: hashes whatever is written to the tensors.
    :returns: writable arrays of the tensors.
    :raises CheckpointError: the format lacks a dtype.
    """
    if not path.exists():
        header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            if name == _METADATA:
                raise CheckpointError(
                    f"A tensor must not have the name `{name}`, which safetensors reserves."
                )
            if dtype not in _NAMES:
                raise CheckpointError(
                    f"`{name}` must be of a dtype that safetensors has, but is of {dtype}. Choose "
                    "one with `--dtype`."
                )
            begin, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        temporary = path.with_name(f".{path.name}.layout")
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        temporary.replace(path)
    return read(path, hashing)[0]


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, Index, int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, stop]}:
            # Rejects booleans, and sizes that torch cannot hold.
            if (
                dtype in _DTYPES
                and all(type(number) is int and number >= 0 for number in (*shape, begin, stop))
                and prod(max(1, size) for size in shape) < 2**60
            ):
                return _DTYPES[dtype], tuple(shape), begin, stop
    raise CheckpointError(
        f"`{name}` in `{path}` must have a known dtype, a shape and two offsets, but has "
        f"{shown(entry)}."
    )
