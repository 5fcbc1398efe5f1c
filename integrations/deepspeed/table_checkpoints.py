"""Saves and loads tables with an optimizer of their own, next to the files of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch.nn import Module

from tp_embed.checkpoint.formats.apart import (
    DIRECTORY,
    MAPPED_DIRECTORY,
    STAMP,
    check_stamp,
    read_note,
    write_note,
)
from tp_embed.checkpoint.table_files import SavedTable, save_tables
from tp_embed.checkpoint.table_loading import TableLoader
from tp_embed.gang import Gang, GangError
from tp_embed.gang.agreement import of_all_ranks, raise_together
from tp_embed.gang.process_group import ProcessGroupGang

from .mapped_tables import Snapshots
from .own_tables import OwnTable

_WHAT = "Loading tables"


class TableCheckpoints:
    """Makes checkpoints of an engine hold tables that DeepSpeed would save by rank, and their
    optimizers.

    Tables in memory are in a directory of the tag, in the format of
    ``torch.distributed.checkpoint``: whole, so that engines load them at any tensor- and
    data-parallel size, strategy and placement. Each rank writes a part, before DeepSpeed writes the
    file ``latest``. The files of DeepSpeed lack them. Of tables in memory-mapped files there are
    snapshots. A stamp of the save is next to the tables and in the client state, so that the model
    and the tables of two saves under one tag do not load together.

    :param tables: those in memory.
    :param copies: for each table, which of the copies of its shard this rank holds, out of how
        many.
    :param snapshots: of the other tables.
    """

    def __init__(
        self,
        engine: Any,
        tables: Sequence[OwnTable],
        copies: Sequence[tuple[int, int]],
        snapshots: Snapshots,
    ) -> None:
        self._engine, self._snapshots = engine, snapshots
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
        engine.save_checkpoint = self._saving(engine.save_checkpoint)
        engine.load_checkpoint = self._loading(engine.load_checkpoint)

    def open(self, tag: Path, *, with_states: bool = True) -> Callable[[Any], None]:
        """Checks that the engine has the tables in the directory of a tag, also of a universal
        checkpoint.

        :param with_states: whether to load the states of the optimizers.
        :returns: a function that loads them, with the client state that DeepSpeed has loaded. All
            ranks must call it, too.
        :raises ValueError: they don't fit, or there are others; a :class:`GangError` on other
            ranks.
        """
        note = raise_together(self._world, lambda: self._check(tag), _WHAT)
        loader = None
        if self._tables:
            loader = TableLoader(
                tag / DIRECTORY, self._tables, self._world, with_states=with_states
            )
        self._snapshots.check(tag)

        def load(client_state: Any) -> None:
            stamp = (client_state or {}).pop(STAMP, None)
            raise_together(self._world, lambda: check_stamp(tag, note.get(STAMP), stamp), _WHAT)
            if loader is not None:
                loader.load()
            self._snapshots.load(tag, note.get("groups", {}))

        return load

    def _check(self, tag: Path) -> Mapping[str, Any]:
        if not self._tables and (tag / DIRECTORY).is_dir():
            raise ValueError(
                f"`{tag}` must have no tables of an engine that keeps them in memory, since the "
                f"engine keeps {self._snapshots.names} in memory-mapped files, but has a directory "
                f"`{DIRECTORY}`. Leave `memory` out of `tp_embed.tables`, as in the engine that "
                "was saved."
            )
        note = read_note(tag)
        found = sorted(note.get("groups", ()))
        if not note and (tag / MAPPED_DIRECTORY).is_dir():
            raise ValueError(
                f"`{tag}` must have all snapshots of one save, but saving was not finished. Load "
                "another tag."
            )
        if found != self._snapshots.names:
            raise ValueError(
                f"`{tag}` must have snapshots of the tables in memory-mapped files, "
                f"{self._snapshots.names}, but has {found}. Set `memory` in `tp_embed.tables` for "
                "the same tables as in the engine that was saved."
            )
        return note

    def _saving(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(save_checkpoint)
        def save(
            save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
            client_state = dict(client_state or {})
            if save_dir:
                client_state[STAMP] = self._save(Path(save_dir, tag))
            with self._left_out(), self._snapshots.left_out():
                return save_checkpoint(save_dir, tag, client_state, *args, **kwargs)

        return save

    def _save(self, tag: Path) -> str:
        """Saves the tables, and returns the stamp. Until all are saved, the tag has none."""
        stamp: str = of_all_ranks(self._world, uuid4().hex)[0]

        def note(content: Mapping[str, Any] | None) -> None:
            raise_together(
                self._world,
                lambda: write_note(tag, content) if self._world.rank == 0 else None,
                "Saving tables",
            )

        note(None)
        if self._tables:
            save_tables(tag / DIRECTORY, self._tables, self._world)
        self._snapshots.save(tag)
        note({STAMP: stamp, "groups": self._snapshots.groups()})
        return stamp

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
            with_states = load_optimizer_states and not load_module_only
            if self._snapshots.names and not with_states:
                raise ValueError(
                    "`load_optimizer_states` must be True and `load_module_only` False for tables "
                    "in memory-mapped files, whose states are in their snapshots. Leave them out."
                )
            found = self._find_tag(load_dir, tag)
            # Before anything changes.
            load_tables = None if found is None else self.open(found, with_states=with_states)
            with self._left_out(), self._snapshots.left_out():
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
            if load_tables is not None:
                load_tables(client_state)
            return path, client_state

        return load

    def _find_tag(self, load_dir: Any, tag: Any) -> Path | None:
        found = _find_together(self._world, self._engine, load_dir, tag)
        tags = of_all_ranks(self._world, None if found is None else found.name)
        if len(set(tags)) > 1:
            raise GangError(
                f"`load_checkpoint()` must find the same tag on all ranks, but finds {tags}, by "
                "rank. Save to a directory that all nodes share, and pass the same `load_dir` and "
                "`tag` on each."
            )
        return found

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


def _find_together(world: Gang, engine: Any, directory: Any, tag: Any) -> Path | None:
    return raise_together(world, lambda: find_tag(engine, directory, tag), "Loading a checkpoint")


def refuse_tables(engine: Any) -> None:
    """Makes an engine without tables of this kind refuse checkpoints that have some: it would lack
    them, or with ``load_module_strict=False`` leave them out."""
    load_checkpoint, world = engine.load_checkpoint, ProcessGroupGang(None, engine.device)

    @wraps(load_checkpoint)
    def load(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        check_no_tables(world, _find_together(world, engine, load_dir, tag))
        return load_checkpoint(load_dir, tag, *args, **kwargs)

    engine.load_checkpoint = load


def check_no_tables(world: Gang, tag: Path | None) -> None:
    """Checks that the directory of a tag has no tables of this kind, as any rank sees it. All ranks
    of ``world`` must call it.

    :raises ValueError: it has, on all ranks.
    """
    kinds = DIRECTORY, MAPPED_DIRECTORY
    own = [kind for kind in kinds if tag is not None and (tag / kind).is_dir()]
    found = {kind for kinds in of_all_ranks(world, own) for kind in kinds}
    if found:
        raise ValueError(
            f"The checkpoint (here `{tag}`) must have no tables with an optimizer of their own, "
            f"since the engine has none, but has {sorted(found)}. Name them in `tp_embed.tables`, "
            "as in the engine that was saved, or load the weights by `tp-embed convert --to hf`."
        )
