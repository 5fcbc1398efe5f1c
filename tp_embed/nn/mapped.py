"""Tables in memory-mapped files, for tables that are larger than the memory."""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import swap_tensors

from tp_embed.gang import Gang, GangError
from tp_embed.gang.agreement import of_all_ranks, raise_together
from tp_embed.lookup.distinct import find_distinct
from tp_embed.lookup.exchange import Staging
from tp_embed.lookup.ids import as_indices
from tp_embed.lookup.own_ids import OwnIds, RowsToOwn
from tp_embed.mapped.optimizers import adopt_states, replace_states
from tp_embed.mapped.resident import can_measure
from tp_embed.mapped.store import RowStore, store_of
from tp_embed.nn.table import Table
from tp_embed.parameter.sharded import local


def map_table(
    table: Table,
    directory: str | Path,
    *,
    resident: int = 512 << 20,
    dtype: torch.dtype | None = None,
) -> MappedTable:
    """Moves a table to memory-mapped files, and the states of its optimizer too, which must be one
    of :mod:`tp_embed.optim`. Then a step reads and writes the pages of the rows
    that it touches, and the table may be larger than the memory.

    A directory that has the table already is continued, at its last step. A new one gets the values
    of ``table``, or, if these are on ``meta``, its initial values, a block at a time. Each rank
    writes to a folder of its own, so the directory may be on a local disk, with the same path on
    all nodes or not.

    States that an optimizer has in memory move to a new directory too. One that is made for a
    directory that is continued goes on with the states there.

    **Steps are atomic.** Whenever a process is killed, the next run finds the table as it was after
    a whole step, the same one on all ranks: the last one or the one before. For that, a step saves
    the rows that it overwrites, with their states. When the *machine* stops, writes of the system
    may be lost; such a directory is refused, unless :meth:`MappedTable.flush` was called after the
    last step. Restore a snapshot then.

    Collective: all ranks of the table's gang must call it.

    :param table: a table that is sharded along its vocabulary, or whole, with ``sparse=True``. Make
        it with ``device="meta"`` if it does not fit into the memory.
    :param directory: where the files are.
    :param resident: the most bytes of its pages that stay in the memory of this process (RSS). The
        system keeps others in its page cache as long as it has room.
    :param dtype: the dtype of the table in the files; if ``None``, the dtype of ``table``.
    :raises ValueError: the table cannot be mapped, or the directory has another one, is in use, is
        damaged or lacks writes that were lost, or has the states of another optimizer.
    :raises GangError: ranks fail, or hold different steps, more than one apart.
    :raises OSError: the disk is full, or permission is missing.
    """
    if not isinstance(table, Table) or table.shard_dim != 0:
        raise TypeError(
            "`table` must be a `RowWiseEmbedding`, a `VocabShardedEmbedding` or a "
            f"`StandardEmbedding`, but is a `{type(table).__name__}` instead. Shard it by 'vocab' "
            "or 'world'."
        )
    gang, before = table.gang, local(table.weight).detach()
    store = _open_together(table, Path(directory), resident, dtype)
    try:
        _agree(store, gang)
        states = raise_together(gang, lambda: adopt_states(store, table.weight))
        if store.is_new and not before.is_meta:
            store.weight.copy_(before)
        _replace(table, store.weight)
        if store.is_new:
            if before.is_meta:
                table.reset_parameters()
            raise_together(gang, store.finish)
    except BaseException:
        _replace(table, before)
        store.close()
        raise
    replace_states(states, store.state())
    return MappedTable(table, store)


def _open_together(
    table: Table, directory: Path, resident: int, dtype: torch.dtype | None
) -> RowStore:
    """Opens the store of each rank, or closes it if another rank fails, so that all may retry."""
    opened: list[RowStore] = []
    try:
        raise_together(table.gang, lambda: opened.append(_open(table, directory, resident, dtype)))
    except BaseException:
        for store in opened:
            store.close()
        raise
    return opened[0]


def _open(table: Table, directory: Path, resident: int, dtype: torch.dtype | None) -> RowStore:
    _check(table, resident)
    gang, weight = table.gang, local(table.weight)
    partition = table.partition
    header = {
        "format": 1,
        "num_embeddings": table.num_embeddings,
        "embed_dim": table.embed_dim,
        "dtype": str(dtype or weight.dtype),
        "placement": "cyclic" if partition.cyclic else "block",
        "rank": gang.rank,
        "ranks": gang.size,
    }
    path = directory / folder(gang)
    folders = [path.name for path in directory.glob("rank-*-of-*")]
    others = sorted(name for name in folders if not name.endswith(f"-of-{gang.size}"))
    if others:
        raise ValueError(
            f"`{directory}` must hold a table over {gang.size} ranks, but has {others}. Use as "
            "many ranks; or map the table to another directory, and load whole values, saved in "
            "`tp_embed.checkpoint.hook_state_dict(model)`."
        )
    return RowStore(path, header, tuple(weight.shape), dtype or weight.dtype, resident)


def folder(gang: Gang) -> str:
    """Returns the name of the folder of this rank."""
    return f"rank-{gang.rank}-of-{gang.size}"


def _check(table: Table, resident: int) -> None:
    if not table.sparse:
        raise ValueError(
            "`sparse` must be True for a table in memory-mapped files, whose dense gradient would "
            "take as much memory, but is False instead. Make the table with `sparse=True`."
        )
    if table.is_apart or store_of(table.weight) is not None:
        raise ValueError("`table` must not be mapped or set apart already, but is.")
    if table.gang.device.type != "cpu":
        raise ValueError(
            "The gang of a table in memory-mapped files must be on the CPU, but is on "
            f"'{table.gang.device}' instead. Look it up on the host: "
            "`ProcessGroupGang(group_of_gloo, 'cpu')`."
        )
    if resident < 1:
        raise ValueError(f"`resident` must be at least 1, but is {resident} instead.")
    if not can_measure():
        raise ValueError("Memory-mapped tables need Linux, whose `/proc/self/statm` is missing.")


def _replace(table: Table, values: Tensor) -> None:
    """Gives the weight other values in place, so that optimizers and models keep it."""
    weight = table.weight
    if weight.is_meta != values.is_meta:
        swap_tensors(weight, Parameter(values, requires_grad=weight.requires_grad))
    else:
        weight.data = values
    table._adopt()


def _agree(store: RowStore, gang: Gang) -> None:
    """Brings the stores of all ranks to the same step."""
    found = of_all_ranks(gang, [store.is_new, store.step, store.oldest])
    steps = [step for _, step, _ in found]
    if any(is_new for is_new, *_ in found):
        if max(steps) > 0:
            raise GangError(
                "All ranks must have their part of the table, or none, but the directories of the "
                f"ranks {[r for r, (is_new, *_) in enumerate(found) if is_new]} are new, while "
                f"the steps are {steps}. Give each rank the directory that it had, or delete all."
            )
        if not store.is_new:  # The first run was killed before all ranks were done.
            store.clear()
        return
    if min(steps) < max(oldest for *_, oldest in found):
        raise GangError(
            "The files of all ranks must be at the same step, or one apart, but are at the steps "
            f"{steps}, by rank. Delete the directories and restore a snapshot."
        )
    store.go_back(min(steps))


def _own_rows(table: Table, ids: Tensor, order: OwnIds) -> Tensor:
    """Returns the rows of this rank's block that lookups of ``ids``, on all ranks, will read."""
    place = table._lookup.place
    if table.output == "own" and place.gang.size > 1:
        return RowsToOwn(place, ids, None, True, Staging(), order, False).rows
    rows: Tensor = place.position(ids.flatten().long()) - place.rows.start
    return rows[(rows >= 0) & (rows < len(place.rows))]


class MappedTable:
    """A table in memory-mapped files; :func:`map_table` makes it. The table itself is used as any
    other. As a context manager, closes the files at the end."""

    def __init__(self, table: Table, store: RowStore) -> None:
        self._table: Any = weakref.ref(table)
        self._store, self._gang = store, table.gang
        self._pool = ThreadPoolExecutor(1, "tp_embed prefetch")
        self._fetching: Future[None] | None = None
        self._order = OwnIds(f"prefetch() of {type(table).__name__}({table.num_embeddings})")
        weakref.finalize(table, store.close)

    @property
    def step(self) -> int:
        """How many steps of the optimizer are done in the files, in all runs."""
        return self._store.step

    @property
    def path(self) -> Path:
        """The folder of this rank."""
        return self._store.path

    def prefetch(self, ids: Tensor) -> None:
        """Starts to read the rows of a later lookup, and their states, from the disk to the page
        cache, in the background. Changes no values; pays if the table is larger than the memory.

        For a :class:`~tp_embed.RowWiseEmbedding`, all ranks must call it, with ids of their own,
        and send 32 (P-1) bytes, and 4 bytes for each distinct id of another rank.

        :param ids: as for the lookup. *Shape:* any. *Dtype:* any integer.
        :raises TypeError: ``ids`` does not have an integer dtype.
        """
        self._wait()
        store, table = self._checked(), self._table()
        rows = find_distinct(_own_rows(table, as_indices(ids), self._order)).ids
        self._fetching = self._pool.submit(store.populate, rows, True)

    def _checked(self) -> RowStore:
        store = self._opened()
        store.check()
        return store

    def _opened(self) -> RowStore:
        if not self._store.is_open:
            raise ValueError(
                "A `MappedTable` must be open, but was closed, or its table is gone. Keep the "
                "table, or map it again with `map_table()`."
            )
        return self._store

    def _wait(self) -> None:
        fetching, self._fetching = self._fetching, None
        if fetching is not None:
            fetching.result()

    def flush(self) -> None:
        """Waits until all that was written is on the disk, so that it outlives a power loss."""
        self._checked().flush()

    def snapshot(self, directory: str | Path) -> None:
        """Copies the table and the states of its optimizer to a new directory, on the disk. Shares
        blocks where the file system can. Replaces a snapshot that is there.

        Collective: all ranks of the gang must call it.
        """
        path = Path(directory) / folder(self._gang)
        raise_together(self._gang, lambda: self._checked().snapshot(path), "The snapshot")

    def check_snapshot(self, directory: str | Path) -> Path:
        """Checks that :meth:`restore` can take a snapshot, and returns this rank's folder of it.

        Collective: all ranks of the gang must call it. Raises the errors of :meth:`restore`.
        """
        path = Path(directory) / folder(self._gang)

        def read() -> Any:
            if not path.is_dir():
                found = sorted(each.name for each in path.parent.glob("rank-*-of-*"))
                raise ValueError(
                    f"`{path.parent}` must hold a snapshot of this table, but has "
                    f"{found or 'none'} and no `{path.name}`. Use as many ranks as when it was "
                    "taken, and a directory that has the folders of all ranks."
                )
            return self._opened().read_snapshot(path)["step"]

        steps = of_all_ranks(self._gang, raise_together(self._gang, read, "The snapshot"))
        if len(set(steps)) > 1:
            raise GangError(
                f"`directory` must have a snapshot of one step, but has the steps {steps}, by "
                "rank. Choose a whole one."
            )
        return path

    def restore(self, directory: str | Path) -> None:
        """Takes the values and the step of a :meth:`snapshot`, and the states of the optimizer.

        Collective: all ranks of the gang must call it. If it is interrupted, the files are refused
        from then on, until it is called again in this process.

        :raises ValueError: there is no snapshot, or it is of another table or number of ranks.
        :raises GangError: it is of another step on another rank.
        """
        path = self.check_snapshot(directory)
        self._wait()
        store = self._store
        # A rank that begins to copy while another has not would mix their histories if killed.
        try:
            raise_together(self._gang, store.begin_rewriting, "The restore")
            raise_together(self._gang, lambda: store.take(path), "The restore")
            raise_together(self._gang, store.end_rewriting, "The restore")
        except BaseException:
            store.is_spoiled = True
            raise

    def close(self) -> None:
        """Flushes the files and closes them; the table can't be used afterwards."""
        if self._store.is_open:
            self._wait()
            self._pool.shutdown()
            self._store.flush()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MappedTable('{self.path}', step={self.step})"
