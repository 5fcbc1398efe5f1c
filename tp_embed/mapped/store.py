"""The rows of one rank in a directory: a block of a table, and the states of its optimizer."""

from __future__ import annotations

import json
import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_embed._torch_private import DisableTorchFunctionSubclass
from tp_embed.mapped.directory import BOOT, has_table, of_record, read_snapshot, write_snapshot
from tp_embed.mapped.files import (
    MappedFile,
    check_size,
    copy_file,
    locked,
    nbytes,
    sync,
    write_file,
)
from tp_embed.mapped.journal import DAMAGED, HEAD_BYTES, Journal, Record, Records
from tp_embed.mapped.resident import ResidentLimit

# Files below this fraction of the resident memory stay in it: states with a number per row.
_SMALL = 8

_CLOSED = (
    "The files of a mapped table must be open to use it, but are closed. Map the table again with "
    "`map_table()`."
)

# Must be called before some rows are written; see `RowStore.step_of()`.
Save = Callable[[int, int], object]

# The stores of mapped tensors, by their addresses. An address is removed with its mapping.
_STORES: dict[int, weakref.ref[RowStore]] = {}


class RowStore:
    """Holds a block of a table, and tensors with a state for each of its rows, in files.

    Opening the directory of a killed run undoes a step that is not done. :meth:`go_back` undoes the
    last one, too.

    :param path: the directory of this rank.
    :param header: describes the block; a directory with another one is refused.
    :param resident: how many bytes of mapped pages the process keeps.
    :raises ValueError: the directory is in use, has another table, or is damaged.
    :raises OSError: the disk is full, or permission is missing.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        resident: int,
    ) -> None:
        self.path, self._header = path, dict(header)
        self._shape, self._dtype = shape, dtype
        # The rest is for reads elsewhere, and for the journal.
        self._most = resident // 4 * 3
        path.mkdir(parents=True, exist_ok=True)
        self.is_open, self.is_spoiled, self._open = True, False, ExitStack()
        self._open.enter_context(locked(path / "lock", f"The table in `{path}`"))
        try:
            self.is_new = not has_table(path, self._header)
            self._map()
            self._open.callback(ResidentLimit(resident, self.release).stop)
        except BaseException:
            self._open.close()
            raise

    def _map(self) -> None:
        if self.is_new:
            for name in ("*.bin", "journal", "records", "rewriting", "unsaved", "table.json"):
                for file in self.path.glob(name):
                    file.unlink()
        else:
            check_size(self.path / "records", 1, DAMAGED)
            check_size(self.path / "journal", HEAD_BYTES, DAMAGED)
        self._files: dict[str, MappedFile] = {}
        self.weight = self._add("weight", self._shape, self._dtype, not self.is_new)
        self._records = Records(self.path / "records")
        self._open.callback(self._records.close)
        self._journal = Journal(self.path / "journal")
        self._tensors: dict[str, Tensor] = {}
        self._record: Record = {"step": 0, "values": {}, "tensors": {}}
        if self.is_new:
            self._mark_unsaved()
            self._records.write(self._record)
        self._read()
        if self._journal.step == self.step + 1:
            self._undo()

    def _read(self) -> None:
        """Takes the last record, and maps its tensors."""
        records = self._records.read()
        if not records:
            raise ValueError(f"`{self.path}` must have records of steps, but has none. {DAMAGED}")
        self._record = records[max(records)]
        self._optimizer = self._record["values"].get("optimizer")
        self._tensors = {
            name: self._add(name, *of_record(entry), True)
            for name, entry in self._record["tensors"].items()
        }

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, exists: bool = False
    ) -> Tensor:
        if name not in self._files:
            path, size = self.path / f"{name}.bin", nbytes(shape, dtype)
            if exists:
                check_size(path, size, DAMAGED)
            file = MappedFile(path, size)
            self._files[name] = file
            address = file.bytes.untyped_storage().data_ptr()
            _STORES[address] = weakref.ref(self)
            weakref.finalize(file.map, _STORES.pop, address, None)
        return self._files[name].view(shape, dtype)

    @property
    def step(self) -> int:
        """How many steps are done."""
        step: int = self._record["step"]
        return step

    @property
    def oldest(self) -> int:
        """The oldest step that the table can :meth:`go_back` to."""
        can_undo = 0 < self.step == self._journal.step and self.step - 1 in self._records.read()
        return self.step - can_undo

    def state(self) -> dict[str, Any]:
        """Returns the states of the optimizer after the last step: tensors and numbers."""
        values = {k: v for k, v in self._record["values"].items() if k != "optimizer"}
        return {**values, **self._tensors}

    def claim(self, optimizer: str) -> None:
        """Checks that the states are of an ``optimizer`` of this class, whose name records have."""
        held = self._record["values"].get("optimizer", optimizer)
        if held != optimizer:
            raise ValueError(
                f"The optimizer of `{self.path}` must be a `{held}`, whose states it has, but is a "
                f"`{optimizer}` instead. Use that one, or map the table to a new directory."
            )
        self._optimizer = optimizer

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns zeros in a new file, to become part of the state when a step is done.

        :param shape: *Shape:* :math:`(V_{rank},*)`.
        :raises ValueError: the state has this name already.
        """
        if name in self._tensors:
            raise ValueError(f"`{name}` of `{self.path}` must be new, but has values of a step.")
        self._files.pop(name, None)
        (self.path / f"{name}.bin").unlink(missing_ok=True)
        return self._add(name, shape, dtype)

    @contextmanager
    def step_of(self, rows: Tensor, state: Mapping[str, Any]) -> Iterator[Save]:
        """Makes what this context writes one step: if it raises, nothing was written.

        :param rows: the rows that it may write, distinct. *Shape:* :math:`(U)`.
        :param state: all states of the optimizer, at the end of the context: tensors of
            :meth:`zeros`, and numbers.
        :returns: a function that must be called with the bounds of a part of ``rows`` before these
            are written.
        """
        self._mark_unsaved()
        self.populate(rows)
        self._journal.begin(self.step + 1, rows, self._written())
        try:
            yield self._journal.save
        except BaseException:
            self._undo()
            raise
        self._write_record(self.step + 1, state)

    def _write_record(self, step: int, state: Mapping[str, Any]) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        record: Record = {
            "step": step,
            "values": {
                "optimizer": self._optimizer,
                **{name: value for name, value in state.items() if name not in tensors},
            },
            "tensors": {
                name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
                for name, value in tensors.items()
            },
        }
        self._records.write(record)
        self._record, self._tensors = record, tensors

    def _written(self) -> dict[str, Tensor]:
        return {"weight": self.weight, **self._tensors}

    def _undo(self) -> None:
        self._journal.undo(self._written())
        self._journal.forget()

    def go_back(self, step: int) -> None:
        """Goes back to ``step``, which is :attr:`oldest` or :attr:`step`."""
        if step < self.step:
            self._records.erase(self.step)
            self._read()
            self._undo()

    def clear(self) -> None:
        """Makes the directory a new one again."""
        self.is_new = True
        self._map()

    def finish(self) -> None:
        """Marks a new directory as complete."""
        write_file(self.path / "table.json", json.dumps(self._header))
        self.is_new = False

    @contextmanager
    def rewriting(self, state: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Writes any rows in this context. If it does not end, the directory is refused, and if it
        raises, the store too.

        :param state: all states of the optimizer, at the end of the context, if they change.
        """
        try:
            self.begin_rewriting()
            yield
            self.end_rewriting(state)
        except BaseException:
            self.is_spoiled = True
            raise

    def begin_rewriting(self) -> None:
        write_file(self.path / "rewriting", "")
        self._mark_unsaved()
        self._journal.forget()

    def end_rewriting(self, state: Mapping[str, Any] | None = None) -> None:
        if state is not None:
            self._write_record(self.step, state)
        (self.path / "rewriting").unlink()
        sync(self.path)
        self.is_spoiled = False

    def check(self) -> None:
        """Checks that the rows are there, and whole."""
        if not self.is_open:
            raise ValueError(_CLOSED)
        if self.is_spoiled:
            raise ValueError(
                f"`{self.path}` must hold a whole table, but what wrote all of it has failed, as "
                "`decay_all()` or a restore. Restore a snapshot: `MappedTable.restore()`."
            )

    def _mark_unsaved(self) -> None:
        if not (self.path / "unsaved").exists():
            write_file(self.path / "unsaved", BOOT.read_text())

    def flush(self) -> None:
        """Waits until all is on the disk."""
        for file in self._files.values():
            file.flush()
        self._journal.flush()
        self._records.flush()
        (self.path / "unsaved").unlink(missing_ok=True)
        sync(self.path)

    def release(self) -> None:
        """Releases the memory of all mapped pages; they stay in the system's page cache."""
        for file in list(self._files.values()):
            file.release()
        self._journal.release()

    def populate(self, rows: Tensor, is_ahead: bool = False) -> None:
        """Maps the pages of some ``rows`` and their states, which will be written.

        :param is_ahead: whether they are for later: then the disk gets all requests first.
        """
        files = [(self._files[name], t[:1].nbytes) for name, t in self._written().items() if len(t)]
        absent = [file.absent(rows, row_bytes) for file, row_bytes in files]
        held = sum(file.present for file in list(self._files.values()))
        if (held + sum(map(len, absent))) * mmap.PAGESIZE > self._most:
            for file, _ in files:
                if file.size > self._most // _SMALL:
                    file.release()
            absent = [file.absent(rows, row_bytes) for file, row_bytes in files]
        mapped = [(file, pages) for (file, _), pages in zip(files, absent, strict=True)]
        for file, pages in mapped if is_ahead else ():
            file.fetch(pages)
        for file, pages in mapped:
            file.populate(pages)

    def snapshot(self, path: Path) -> None:
        """Copies the table and the states to the directory ``path``; see :func:`write_snapshot`."""
        files = [self._files[name].path for name in self._written()]
        write_snapshot(path, self._header, self._record, files)

    def read_snapshot(self, path: Path) -> Record:
        """Returns the record of a snapshot of this table; see :func:`read_snapshot`."""
        return read_snapshot(path, self._header, self.weight.nbytes)

    def take(self, path: Path) -> None:
        """Takes the table and the states of a snapshot, after :meth:`begin_rewriting`."""
        record = self.read_snapshot(path)
        self._tensors = {}
        copy_file(path / "weight.bin", self.path / "weight.bin")
        for name, entry in record["tensors"].items():
            self.zeros(name, *of_record(entry))
            copy_file(path / f"{name}.bin", self.path / f"{name}.bin")
        for step in (0, 1):
            self._records.erase(step)
        self._records.write(record)
        self._read()

    def close(self) -> None:
        """Lets other processes open the directory. The table can't be used afterwards."""
        self.is_open = False
        self._open.close()
        self._files = {}


def store_of(tensor: Tensor) -> RowStore | None:
    """Returns the store of a mapped tensor, or ``None`` for other tensors.

    :raises ValueError: the store is closed.
    """
    if not _STORES or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    with DisableTorchFunctionSubclass():
        found = _STORES.get(tensor.untyped_storage().data_ptr())
    if found is None:
        return None
    store = found()
    if store is None:
        raise ValueError(_CLOSED)
    store.check()
    return store


def new_zeros(
    weight: Tensor, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype
) -> Tensor:
    """Returns zeros where ``weight`` lives: in its memory, or in a file next to its own.

    :param name: the name of the file.
    """
    store = store_of(weight)
    if store is None:
        return weight.new_zeros(shape, dtype=dtype)
    return store.zeros(name, tuple(shape), dtype)


def select_rows(weight: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.index_select(weight, 0, rows, out=out)`` for any weight, mapped ones too."""
    store = store_of(weight)
    if store is not None:
        store.populate(rows)
    found: Tensor = torch.index_select(weight, 0, rows, out=out)
    return found


def step_of(weight: Tensor, rows: Tensor, state: Mapping[str, Any]) -> AbstractContextManager[Save]:
    """:meth:`RowStore.step_of`, which does nothing for other tensors."""
    store = store_of(weight)
    return nullcontext(_save_nothing) if store is None else store.step_of(rows, state)


def _save_nothing(start: int, stop: int) -> None:
    pass


def rewriting(
    weight: Tensor, state: Mapping[str, Any] | None = None
) -> AbstractContextManager[None]:
    """:meth:`RowStore.rewriting`, which does nothing for other tensors."""
    store = store_of(weight)
    return nullcontext() if store is None else store.rewriting(state)
