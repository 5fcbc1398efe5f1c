"""Files that are one pickle: read without importing classes or functions from anywhere."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, asks_to_import

# How many bytes follow an opcode, or how it is said (less than 0).
_ARGUMENTS = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


class StandIn:
    """An instance of a class that is not imported, with what the pickle says of it."""

    fields: Any = None

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.fields = state


def load(
    path: Path, stand_ins: Mapping[tuple[str, str], type], *, allow_unsafe: bool = False
) -> Any:
    """What a pickle holds.

    :param stand_ins: the classes to use instead of those of a module and a name. Dtypes of torch
        are there as they are.
    :param allow_unsafe: import the others that the file asks for.
    :raises CheckpointError: it is no pickle, or a damaged one.
    :raises UnsafeCheckpointError: it asks for others.
    """
    data = path.read_bytes()
    unpickler = _Unpickler(io.BytesIO(data), stand_ins, allow_unsafe)
    try:
        _check_memo(data)
        value = unpickler.load()
    except Exception as e:  # Of a damaged file anything is possible.
        if not unpickler.refused:
            raise CheckpointError(
                f"`{path}` must be a pickle of plain values, but cannot be read: "
                f"{type(e).__name__}: {e}. Copy it again."
            ) from e
    if unpickler.refused:
        raise asks_to_import(path, sorted(unpickler.refused))
    return value


class _Unpickler(pickle.Unpickler):
    """``refused`` are the classes and functions that were asked for and not to be had."""

    def __init__(
        self, file: Any, stand_ins: Mapping[tuple[str, str], type], allow_unsafe: bool
    ) -> None:
        super().__init__(file)
        self._stand_ins = stand_ins
        self._allow_unsafe = allow_unsafe
        self.refused: set[str] = set()

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in self._stand_ins:
            return self._stand_ins[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if self._allow_unsafe:
            return super().find_class(module, name)
        self.refused.add(f"{module}.{name}")
        return StandIn  # To find the others too; what is loaded is not used.


def _check_memo(data: bytes) -> None:
    """Python makes space for the largest number under which a pickle keeps something.

    :raises ValueError: it is larger than it can be.
    """
    position = 0
    while position < len(data):
        code = data[position]
        position += 1
        size = _ARGUMENTS.get(code, 0)
        if size == pickletools.UP_TO_NEWLINE:
            end = data.index(b"\n", position)
            if code == pickle.PUT[0] and not 0 <= int(data[position:end]) <= len(data):
                raise ValueError(f"the memo has no {data[position:end]!r}")
            position = end + 1
            if code in (pickle.GLOBAL[0], pickle.INST[0]):  # Two lines.
                position = data.index(b"\n", position) + 1
        elif size < 0:
            first, position = position, position + _LENGTHS[size]
            position += int.from_bytes(data[first:position], "little")
        else:
            if code == pickle.LONG_BINPUT[0]:
                index = int.from_bytes(data[position : position + 4], "little")
                if index > len(data):
                    raise ValueError(f"the memo has no {index}")
            position += size
        if code == pickle.STOP[0]:
            return
