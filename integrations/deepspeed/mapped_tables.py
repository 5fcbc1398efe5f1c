"""Checkpoints of engines with tables in memory-mapped files, which are copied next to them.

DeepSpeed would write such a table and its states through the memory, on the first data-parallel
rank only below ZeRO 3. Instead each rank copies its files to the folder of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tp_embed.checkpoint.formats.apart import MAPPED_DIRECTORY
from tp_embed.nn.mapped import MappedTable
from tp_embed.nn.table import Table
from tp_embed.parameter.sharded import local

from .own_tables import OwnTable

Groups = Mapping[str, Mapping[str, Any]]


class Snapshots:
    """Snapshots of tables in memory-mapped files, in the directory of a tag.

    All ranks must call :meth:`save`, :meth:`check` and :meth:`load`.
    """

    def __init__(self, tables: Iterable[OwnTable]) -> None:
        self._tables: list[tuple[OwnTable, MappedTable]] = [
            (table, table.mapped) for table in tables if table.mapped is not None
        ]
        self.names: Sequence[str] = sorted(table.name for table, _ in self._tables)

    def save(self, tag: Path) -> None:
        for table, mapped in self._tables:
            mapped.snapshot(_folder(tag, table))

    def groups(self) -> dict[str, dict[str, Any]]:
        """Returns the hyperparameters of the optimizers, for JSON, by table."""
        return {
            table.name: {key: value for key, value in group.items() if key not in _PARAMETERS}
            | {"lr": float(group["lr"])}
            for table, _ in self._tables
            for group in table.optimizer.param_groups
        }

    def check(self, tag: Path) -> None:
        for table, mapped in self._tables:
            mapped.check_snapshot(_folder(tag, table))

    def load(self, tag: Path, groups: Groups) -> None:
        for table, mapped in self._tables:
            mapped.restore(_folder(tag, table))
            table.optimizer.param_groups[0].update(
                (key, tuple(value) if isinstance(value, list) else value)
                for key, value in groups[table.name].items()
            )

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leaves the rows of these tables out of state dicts, saved and loaded ones."""
        with ExitStack() as stack:
            for layer in {layer for table, _ in self._tables for layer in table.layers}:
                for handle in (
                    layer.register_state_dict_post_hook(_leave_out),
                    layer.register_load_state_dict_pre_hook(_keep),
                ):
                    stack.callback(handle.remove)
            yield


_PARAMETERS = "params", "param_names"


def _folder(tag: Path, table: OwnTable) -> Path:
    return tag / MAPPED_DIRECTORY / table.name


def _leave_out(layer: Table, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    state_dict[f"{prefix}weight"] = local(layer.weight).new_empty(0, layer.embed_dim)


def _keep(layer: Table, state_dict: Any, prefix: str, *_: Any) -> None:
    found = state_dict.get(f"{prefix}weight")
    if found is not None and not found.numel():
        state_dict[f"{prefix}weight"] = layer.weight
