"""What makes a step atomic: the rows that it overwrites, and records of the steps that are done.

Before a step writes rows, their old values go to the journal; when all are written, a record says
that the step is done. So a step that was interrupted can be undone, and so can the last step that
is done, for ranks that must go back to the step of another rank.

All of it is written to shared memory and the page cache, which outlive the process. A process that
is killed at any instruction leaves what it has written before, in this order, so nothing needs a
checksum or a flush. When the machine loses power, pages reach the disk in any order, and a journal
cannot help; :class:`tp_embed.mapped.store.RowStore` notices it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from tp_embed.mapped.files import MappedFile, check_size

Record = dict[str, Any]

DAMAGED = "Delete the directory, map the table again, and restore a snapshot."

HEAD_BYTES = 24

_PAGE = 4096
_ALIGNMENT = 64


class Records:
    """The records of the last two steps that are done. A record has a page of its own, so that
    writing it is atomic, and the step before keeps its record."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def read(self) -> dict[int, Record]:
        """Returns the records by step."""
        found = {}
        for slot in (0, 1):
            page = os.pread(self._file, _PAGE, slot * _PAGE)
            if len(page) < 8:
                continue
            length, checksum = struct.unpack("<II", page[:8])
            text = page[8 : 8 + length]
            if length and crc32(text) == checksum:
                record = json.loads(text)
                found[record["step"]] = record
        return found

    def write(self, record: Record) -> None:
        text = json.dumps(record).encode()
        page = struct.pack("<II", len(text), crc32(text)) + text
        os.pwrite(self._file, page, record["step"] % 2 * _PAGE)

    def erase(self, step: int) -> None:
        os.pwrite(self._file, bytes(8), step % 2 * _PAGE)

    def flush(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class Journal:
    """The old values of the rows that the last step has written.

    The file holds the number of the step, of its rows, and of the rows that are saved so far; the
    rows; and then for each tensor its values.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = MappedFile(path, max(_PAGE, path.stat().st_size if path.exists() else 0))
        self._parts: list[tuple[Tensor, Tensor]] = []

    @property
    def step(self) -> int:
        """The step that the journal can undo; 0 for none."""
        return int(self._head[0])

    @property
    def _head(self) -> Tensor:
        return self._file.view((3,), torch.int64)

    def begin(self, step: int, rows: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Begins a step, and forgets the one before.

        :param rows: the rows that it writes, distinct. *Shape:* :math:`(U)`.
        :param tensors: what it writes. *Shape:* :math:`(V,*)`.
        """
        self.forget()
        size, _ = _layout(len(rows), tensors)
        if size > self._file.size:
            self._file = MappedFile(self._path, size + size // 4)
        self._parts = self._views(len(rows), tensors)
        self._rows(len(rows)).copy_(rows)
        self._head[1], self._head[2] = len(rows), 0
        self._head[0] = step

    def save(self, start: int, stop: int) -> None:
        """Saves the values of some of the rows, before they are written."""
        rows = self._rows(int(self._head[1]))[start:stop]
        stop = start + len(rows)
        for tensor, saved in self._parts:
            torch.index_select(tensor, 0, rows, out=saved[start:stop])
        self._head[2] = stop

    def undo(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes all values back. May be interrupted, and done again.

        :param tensors: as for :meth:`begin`, in the same order.
        """
        total, saved = self._head[1:].tolist()
        check_size(self._path, _layout(total, tensors)[0], DAMAGED)
        rows = self._rows(total)[:saved]
        for tensor, values in self._views(total, tensors):
            tensor.index_copy_(0, rows, values[:saved])

    def forget(self) -> None:
        self._head[0] = 0

    def release(self) -> None:
        self._file.release()

    def flush(self) -> None:
        self._file.flush()

    def _rows(self, count: int) -> Tensor:
        return self._file.bytes[_PAGE : _PAGE + 8 * count].view(torch.int64)

    def _views(self, count: int, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        _, offsets = _layout(count, tensors)
        views = []
        for tensor, offset in zip(tensors.values(), offsets, strict=True):
            part = self._file.bytes[offset : offset + count * _row_bytes(tensor)]
            views.append((tensor, part.view(tensor.dtype).view(count, *tensor.shape[1:])))
        return views


def _layout(count: int, tensors: Mapping[str, Tensor]) -> tuple[int, list[int]]:
    """Returns the size of the file, and where the values of each tensor begin."""
    end, offsets = _aligned(_PAGE + 8 * count), []
    for tensor in tensors.values():
        offsets.append(end)
        end = _aligned(end + count * _row_bytes(tensor))
    return end, offsets


def _row_bytes(tensor: Tensor) -> int:
    return tensor[:1].nbytes if len(tensor) else 0


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
