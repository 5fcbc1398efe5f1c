"""Reads ``torch.save()`` files without running their code or loading tensors, and lays them out
without tensors in memory."""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from tp_embed._torch_private import FakeTensorMode

from ..errors import CheckpointError, asks_to_import, shown
from .arrays import Array, Span, View

# The fixed part of the local file header in a zip archive.
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")

# Plain values, and their limits.
_SCALARS = (type(None), bool, int, float, str)
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 100

_MAX_NUMBER = 2**63


class TorchFile:
    """A file written by ``torch.save()``.

    Imports no classes: instances of classes in ``stand_ins`` become instances of the class given
    there, and all others are refused.

    :param window: the first byte and the size of the archive, if the file contains several.
    :param stand_ins: maps full names of classes in the file to the classes to use.
    :param allow_unsafe: import classes and run the code in the file.
    :raises CheckpointError: the file is damaged, or in another format.
    :raises UnsafeCheckpointError: the file uses other classes or functions.
    """

    def __init__(
        self,
        path: Path,
        *,
        window: tuple[int, int] | None = None,
        stand_ins: Mapping[str, type] | None = None,
        allow_unsafe: bool = False,
    ) -> None:
        self.path = path
        self._first = window[0] if window else 0
        with open_window(path, window) as file:
            self._records = _records(path, file)
            file.seek(0)
            self.root: Any = _unpickle(path, file, stand_ins or {}, allow_unsafe)

    def array(self, tensor: Tensor) -> Array:
        """Returns the array in the file behind ``tensor``, which is part of ``root``.

        :raises CheckpointError: the file lacks its bytes.
        """
        offset = self._first + self._offset(tensor)
        flat = Span(
            self.path,
            offset,
            tensor.untyped_storage().nbytes() // tensor.element_size(),
            tensor.dtype,
        )
        return View(
            flat, tensor.shape, strides=tensor.stride(), offset=int(tensor.storage_offset())
        )

    def value(self, tensor: Tensor) -> Tensor:
        """Loads the values of ``tensor``, which is part of ``root``."""
        return self.array(tensor).load()

    def plain(self, value: Any) -> Any:
        """Converts ``value``, a part of ``root``, to plain Python values. Tensors with one element
        become numbers.

        :raises ValueError: ``value`` contains anything else, which the message names.
        """
        return self._plain(value, iter(range(_MAX_VALUES)), _MAX_DEPTH)

    def plain_entries(self, entries: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns the plain ``entries``, and notes about the others."""
        kept, notes = {}, []
        for key, value in entries.items():
            try:
                if not isinstance(key, str):
                    raise ValueError("a name that is no string")
                kept[key] = self.plain(value)
            except ValueError as e:
                notes.append(f"`{shown(key)}` has {e} in it and was left out.")
        return kept, notes

    def hyperparameters(self, group: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns the plain hyperparameters of a param group, and notes about the others."""
        others = {key: group[key] for key in group if key not in ("params", "param_names")}
        kept, notes = self.plain_entries(others)
        return kept, [f"In a param group {note}" for note in notes]

    def number(self, what: str, value: Any) -> float:
        """Returns ``value``, a number or a one-element tensor of ``root``, as a float.

        :param what: the value's name in messages.
        :raises CheckpointError: it is no number, or not finite, or negative.
        """
        if _is_number(value):
            value = self.value(value).item()
        if type(value) in (int, float) and 0 <= value < _MAX_NUMBER:
            return float(value)
        raise CheckpointError(
            f"{what} in `{self.path}` must be a number of at least 0, but is {shown(value)}. The "
            "file is damaged: copy it again."
        )

    def _plain(self, value: Any, budget: Iterator[int], depth: int) -> Any:
        # A few bytes of pickle can describe endless structures.
        if next(budget, None) is None or not depth:
            raise ValueError(f"more than {_MAX_VALUES} values, or {_MAX_DEPTH} levels")
        if type(value) in _SCALARS:
            return value
        if _is_number(value):
            return self.value(value).item()
        if isinstance(value, (list, tuple)):
            kind = list if isinstance(value, list) else tuple
            return kind(self._plain(each, budget, depth - 1) for each in value)
        if isinstance(value, Mapping) and all(type(key) in _SCALARS for key in value):
            return {key: self._plain(each, budget, depth - 1) for key, each in value.items()}
        raise ValueError(f"a {type(value).__name__}")

    def place(self, tensor: Tensor) -> Hashable:
        """Returns a key that is equal for tensors of ``root`` that share all elements. Empty
        tensors never do."""
        offset = self._offset(tensor)
        if not tensor.numel():
            return object()
        return offset, tensor.storage_offset(), tensor.shape, tensor.stride()

    def _offset(self, tensor: Tensor) -> int:
        if tensor.layout is not torch.strided:
            raise CheckpointError(
                f"The tensors of `{self.path}` must be dense, but one is of {tensor.layout}. Save "
                "it with `to_dense()`."
            )
        if tensor.is_conj() or tensor.is_neg():
            raise CheckpointError(
                f"The tensors of `{self.path}` must hold their own values, but one is a lazy "
                "conjugate. Save it with `resolve_conj()` and `resolve_neg()`."
            )
        storage = tensor.untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        if storage.nbytes() and self._records.get(cast(int, offset)) != storage.nbytes():
            raise CheckpointError(
                f"A tensor of `{self.path}` must have its {storage.nbytes()} bytes in the file, "
                "but they are not there. The file is damaged: copy it again."
            )
        return offset or 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.layout is torch.strided


def placeholder(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Returns a tensor without memory, for :func:`lay_out`."""
    with _fake_mode():
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")


@cache
def _fake_mode() -> Any:
    """Returns a shared mode, since creating one is slow."""
    return FakeTensorMode()


def lay_out(path: Path, root: Any, stand_ins: Mapping[str, type] | None = None) -> TorchFile:
    """Writes ``root`` as ``torch.save()`` does, with space to fill for placeholders and with the
    values of other tensors. Keeps an existing file: it was laid out by an earlier run.

    :param root: plain Python values and tensors.
    :param stand_ins: maps full names of classes to write to the classes used in ``root``.
    :returns: the file, whose arrays are writable.
    """
    if not path.exists():
        temporary = path.with_name(f".{path.name}.layout")
        pickler = _pickler(stand_ins or {})
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(root, temporary, pickle_module=pickler)
        file = TorchFile(temporary, stand_ins=stand_ins)
        for tensor, saved in _pairs(root, file.root):
            if type(tensor) is Tensor:
                array = file.array(saved)
                array.write((0,) * tensor.dim(), tensor.detach())
        temporary.replace(path)
        file.path = path
        return file
    return TorchFile(path, stand_ins=stand_ins)


def _pickler(stand_ins: Mapping[str, type]) -> Any:
    """Returns a replacement for the module ``pickle`` that writes stand-ins under the names of the
    original classes. The pickler in C would import those."""
    if not stand_ins:
        return pickle
    names = {cls: name for name, cls in stand_ins.items()}

    class Pickler(pickle._Pickler):
        # Missing in the stubs of `pickle`.
        write: Callable[[bytes], None]
        memoize: Callable[[Any], None]

        def save_global(self, obj: Any, name: str | None = None) -> None:
            if isinstance(obj, type) and obj in names:
                module, _, own = names[obj].rpartition(".")
                self.write(pickle.GLOBAL + f"{module}\n{own}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)  # type: ignore[misc]

    return SimpleNamespace(__name__="pickle", Pickler=Pickler)


@contextmanager
def open_window(path: Path, window: tuple[int, int] | None = None) -> Iterator[BinaryIO]:
    """Opens the file, or only a window of it: a first byte and a size."""
    with path.open("rb") as file:
        yield file if window is None else cast(BinaryIO, io.BufferedReader(_Window(file, *window)))


class _Window(io.RawIOBase):
    """A part of a file."""

    def __init__(self, file: BinaryIO, first: int, size: int) -> None:
        self._file, self._first, self._size, self._position = file, first, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        self._file.seek(self._first + self._position)
        count = cast(io.BufferedReader, self._file).readinto(view)
        self._position += count
        return count


def _records(path: Path, file: BinaryIO) -> dict[int, int]:
    """Maps the first byte of each record in the archive to its size."""
    file.seek(0, io.SEEK_END)
    end = file.tell()
    records = {}
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if len({info.filename for info in infos}) != len(infos):
                raise CheckpointError(f"`{path}` must not hold two entries of one name, but does.")
            for info in infos:
                file.seek(info.header_offset)
                signature, *_, names, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                first = info.header_offset + _LOCAL_HEADER.size + names + extra
                if (
                    signature != b"PK\3\4"
                    or info.compress_type != zipfile.ZIP_STORED
                    or info.compress_size != info.file_size
                    or first + info.file_size > end
                ):
                    raise CheckpointError(
                        f"The entry `{info.filename}` of `{path}` must be uncompressed and within "
                        "the file, but is not. The file is damaged: copy it again."
                    )
                if info.file_size:
                    records[first] = info.file_size
                if info.filename.endswith("/byteorder"):
                    _check_byteorder(path, archive.read(info))
                if info.filename.endswith("/data.pkl"):
                    _check_memory(path, archive.read(info))
    except (zipfile.BadZipFile, struct.error, OSError, NotImplementedError, ValueError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(
            f"`{path}` must be a file that `torch.save()` of torch 1.6 or newer has written, but "
            f"is not, or is damaged: {e}."
        ) from e
    return records


def _check_byteorder(path: Path, order: bytes) -> None:
    if order != sys.byteorder.encode():
        raise CheckpointError(
            f"`{path}` must have numbers in the byte order of this machine, {sys.byteorder}, but "
            f"says {order[:20]!r}. Save it on a machine like this one."
        )


def _check_memory(path: Path, pickled: bytes) -> None:
    """Rejects `bytearray`, which torch allows and which can allocate any number of bytes.

    :raises UnsafeCheckpointError: the pickle imports it.
    """
    if re.search(rb"c(builtins|__builtin__)\nbytearray\n", pickled):
        raise asks_to_import(path, ["builtins.bytearray"])


def _unpickle(path: Path, file: BinaryIO, stand_ins: Mapping[str, type], allow_unsafe: bool) -> Any:
    try:
        with torch.serialization.safe_globals([(cls, name) for name, cls in stand_ins.items()]):
            if allow_unsafe:
                return torch.load(file, map_location="meta", weights_only=False)
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if found:
                raise asks_to_import(path, found)
            file.seek(0)
            return torch.load(file, map_location="meta", weights_only=True)
    except CheckpointError:
        raise
    except Exception as e:  # A damaged file can raise anything.
        reason = str(e).partition("\n")[0]
        raise CheckpointError(
            f"`{path}` must be a file that `torch.save()` has written, but cannot be read: "
            f"{type(e).__name__}: {reason}. Copy it again, or save it again."
        ) from e


def _pairs(root: Any, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each tensor in ``root`` with its counterpart in ``saved``."""
    if isinstance(root, Tensor):
        yield root, saved
    elif isinstance(root, Mapping):
        for key, value in root.items():
            yield from _pairs(value, saved[key])
    elif isinstance(root, (list, tuple)):
        for value, other in zip(root, saved, strict=True):
            yield from _pairs(value, other)
