"""Checkpoints of engines with tables in memory-mapped files, which are copied next to them.

DeepSpeed would write such a table and its states through the memory, on the first data-parallel
rank only below ZeRO 3. Instead each rank copies its files to the folder of the checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from tp_embed.checkpoint.formats.apart import MAPPED_DIRECTORY
from tp_embed.nn.table import Table
from tp_embed.parameter.sharded import local

from .own_tables import OwnTable


def keep_in_snapshots(engine: Any, tables: Iterable[OwnTable]) -> None:
    """Makes ``engine`` save and load tables in memory-mapped files as snapshots."""
    mapped = [table for table in tables if table.mapped is not None]
    if mapped:
        engine.save_checkpoint = _saving(engine.save_checkpoint, engine, mapped)
        engine.load_checkpoint = _loading(engine.load_checkpoint, mapped)


def _saving(
    save_checkpoint: Callable[..., Any], engine: Any, tables: list[OwnTable]
) -> Callable[..., Any]:
    @wraps(save_checkpoint)
    def save(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        for table in tables:  # Before `latest` names the checkpoint.
            assert table.mapped is not None
            table.mapped.snapshot(_folder(Path(save_dir) / tag, table))
        with _left_out(tables):
            return save_checkpoint(save_dir, tag, *args, **kwargs)

    return save


def _loading(load_checkpoint: Callable[..., Any], tables: list[OwnTable]) -> Callable[..., Any]:
    signature = inspect.signature(load_checkpoint)

    @wraps(load_checkpoint)
    def load(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("load_module_only") or not given.get("load_optimizer_states", True):
            raise ValueError(
                "`load_optimizer_states` must be True and `load_module_only` False for tables in "
                "memory-mapped files, whose states are in their snapshots. Leave them out."
            )
        with _left_out(tables):
            path, client_state = load_checkpoint(*args, **kwargs)
        for table in tables if path is not None else ():
            assert table.mapped is not None
            table.mapped.restore(_folder(Path(path).parent, table))
        return path, client_state

    return load


def _folder(checkpoint: Path, table: OwnTable) -> Path:
    return checkpoint / MAPPED_DIRECTORY / table.name


@contextmanager
def _left_out(tables: Iterable[OwnTable]) -> Iterator[None]:
    """Leaves the rows of these tables out of state dicts, saved and loaded ones."""
    with ExitStack() as stack:
        for layer in {layer for table in tables for layer in table.layers}:
            for handle in (
                layer.register_state_dict_post_hook(_leave_out),
                layer.register_load_state_dict_pre_hook(_keep),
            ):
                stack.callback(handle.remove)
        yield


def _leave_out(layer: Table, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    state_dict[f"{prefix}weight"] = local(layer.weight).new_empty(0, layer.embed_dim)


def _keep(layer: Table, state_dict: Any, prefix: str, *_: Any) -> None:
    found = state_dict.get(f"{prefix}weight")
    if found is not None and not found.numel():
        state_dict[f"{prefix}weight"] = layer.weight
