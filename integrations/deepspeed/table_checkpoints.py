"""Saves and loads tables with an optimizer of their own, next to the files of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from torch.nn import Module

from tp_embed.checkpoint.formats.apart import DIRECTORY
from tp_embed.checkpoint.table_files import SavedTable, save_tables
from tp_embed.checkpoint.table_loading import TableLoader
from tp_embed.gang.process_group import ProcessGroupGang

from .own_tables import OwnTable


class TableCheckpoints:
    """Makes checkpoints of an engine hold tables that DeepSpeed would save by rank, and their
    optimizers.

    They are in a directory of the tag, in the format of ``torch.distributed.checkpoint``: whole, so
    that engines load them at any tensor- and data-parallel size, strategy and placement. Each rank
    writes a part, before DeepSpeed writes the file ``latest``. The files of DeepSpeed lack them.

    :param copies: for each table, which of the copies of its shard this rank holds, out of how
        many.
    """

    def __init__(
        self, engine: Any, tables: Sequence[OwnTable], copies: Sequence[tuple[int, int]]
    ) -> None:
        self._engine = engine
        self._world = ProcessGroupGang(None, engine.device)
        names: dict[Module, list[str]] = {}
        for name, module in engine.module.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(f"{name}.weight")
        self._tables = [
            SavedTable(
                [name for layer in table.layers for name in names[layer]],
                table.layers[0],
                table.optimizer,
                copy,
            )
            for table, copy in zip(tables, copies, strict=True)
        ]
        if not tables:
            refuse_tables(engine)
            return
        engine.save_checkpoint = self._saving(engine.save_checkpoint)
        engine.load_checkpoint = self._loading(engine.load_checkpoint)

    def load(self, tag: Path, *, with_states: bool = True) -> None:
        """Loads the tables from the directory of a tag, also of a universal checkpoint.

        :param with_states: whether to load the states of the optimizers.
        """
        if self._tables:
            self._open(tag, with_states).load()

    def _open(self, tag: Path, with_states: bool) -> TableLoader:
        return TableLoader(tag / DIRECTORY, self._tables, self._world, with_states=with_states)

    def _saving(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(save_checkpoint)
        def save(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
            if save_dir:
                save_tables(Path(save_dir, tag, DIRECTORY), self._tables, self._world)
            with self._left_out():
                return save_checkpoint(save_dir, tag, *args, **kwargs)

        return save

    def _loading(self, load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(load_checkpoint)
        def load(
            load_dir: Any,
            tag: Any = None,
            load_module_strict: bool = True,
            load_optimizer_states: bool = True,
            load_lr_scheduler_states: bool = True,
            load_module_only: bool = False,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            found = find_tag(self._engine, load_dir, tag)
            with_states = load_optimizer_states and not load_module_only
            # Before anything changes.
            loader = None if found is None else self._open(found, with_states)
            with self._left_out():
                path, client_state = load_checkpoint(
                    load_dir,
                    tag,
                    load_module_strict,
                    load_optimizer_states,
                    load_lr_scheduler_states,
                    load_module_only,
                    *args,
                    **kwargs,
                )
            if loader is not None:
                loader.load()
            return path, client_state

        return load

    @contextmanager
    def _left_out(self) -> Iterator[None]:
        """In this context state dicts of the model lack the tables, and do not miss them."""
        weights = {name: table.layer.weight for table in self._tables for name in table.names}

        def leave_out(module: Module, state: Any, prefix: str, local_metadata: Any) -> None:
            for name in weights:
                state.pop(prefix + name, None)

        def keep(module: Module, state: Any, prefix: str, *args: Any) -> None:
            for name, weight in weights.items():
                state[prefix + name] = weight

        module = self._engine.module
        handles = [
            module.register_state_dict_post_hook(leave_out),
            module.register_load_state_dict_pre_hook(keep),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_tag(engine: Any, directory: Any, tag: Any) -> Path | None:
    """Returns the directory that ``engine.load_checkpoint(directory, tag)`` reads; ``None`` if
    there is none, which the engine reports."""
    if tag is None:
        name = "latest_universal" if engine.load_universal_checkpoint() else "latest"
        latest = Path(directory, name)
        tag = latest.read_text().strip() if latest.is_file() else ""
    found = Path(directory, str(tag))
    return found if str(tag) and found.is_dir() else None


def refuse_tables(engine: Any) -> None:
    """Makes an engine without tables of this kind refuse checkpoints that have some: it would lack
    them, or with ``load_module_strict=False`` leave them out."""
    load_checkpoint = engine.load_checkpoint

    @wraps(load_checkpoint)
    def load(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = find_tag(engine, load_dir, tag)
        if found is not None and (found / DIRECTORY).is_dir():
            raise ValueError(
                f"`{found}` must have no tables with an optimizer of their own, since the engine "
                f"has none, but has a directory `{DIRECTORY}`. Name them in `tp_embed.tables`, as "
                "the engine that was saved, or load the weights by `tp-embed convert --to hf`."
            )
        return load_checkpoint(load_dir, tag, *args, **kwargs)

    engine.load_checkpoint = load
