"""Shards tables of engines that other libraries make, without a change to their code."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.util import find_spec
from threading import Lock
from typing import Any

import deepspeed
from torch.nn import Module

from .config import SECTION, gather_when_saving
from .initialize import initialize
from .private import check_before_building, load_ds_config
from .sharding import sharded_by_section

_lock = Lock()
_is_installed = False
# `deepspeed.initialize()` and our replacement, which stays where another library has wrapped it.
_plain: Callable[..., Any] | None = None
_replacement: Callable[..., Any] | None = None


def install() -> None:
    """From now on shards the tables of every engine whose DeepSpeed config has a section
    ``"tp_embed"``, whoever calls :func:`deepspeed.initialize`: as
    :func:`tp_embed.integrations.deepspeed.initialize` does, and in a ``Trainer`` of transformers as
    its callback ``ShardTables``. Configs without the section are left alone.

    Call it before the program makes its engine or Trainer; calls after the first do nothing.
    ``python -m tp_embed.run script.py`` calls it for a program that stays as it is. A library that
    has imported the function itself, by ``from deepspeed import initialize``, is not reached, and
    its engine raises an error.

    Where transformers is installed, it is imported, which takes some seconds.
    """
    global _is_installed, _plain, _replacement
    with _lock:
        _is_installed = True
        if _plain is None:
            _plain = deepspeed.initialize
            deepspeed.initialize = _replacement = _with_section(_plain)
        _change_trainer(is_installed=True)


def uninstall() -> None:
    """Undoes :func:`install`, for engines and Trainers that are made later."""
    global _is_installed, _plain
    with _lock:
        _is_installed = False
        if deepspeed.initialize is _replacement:
            deepspeed.initialize, _plain = _plain, None
        _change_trainer(is_installed=False)


def _change_trainer(is_installed: bool) -> None:
    if find_spec("transformers") is None or find_spec("accelerate") is None:
        return
    from tp_embed.integrations.transformers.trainer import shard_by_default

    shard_by_default(is_installed)


def _with_section(plain: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @wraps(plain)
    def initialize_by_section(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        config = _take_config(given)
        if not _is_installed or SECTION not in config or _is_done(given.get("model")):
            return plain(*args, **kwargs)
        return initialize(**given, config=gather_when_saving(config))

    return initialize_by_section


def _take_config(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the DeepSpeed config out of the arguments of `deepspeed.initialize()`. Returns an empty
    one where DeepSpeed will refuse the arguments."""
    found = [given.pop(name, None) for name in ("config", "config_params")]
    args = given.get("args")
    if (in_args := getattr(args, "deepspeed_config", None)) is not None:
        found.append(in_args)
        given["args"] = copy.copy(args)
        given["args"].deepspeed_config = None
    found = [config for config in found if config is not None]
    return load_ds_config(found[0]) if len(found) == 1 else {}


def _is_done(model: Any) -> bool:
    """Returns whether the section was applied to the model, or to a part of it: PEFT wraps models
    later."""
    return isinstance(model, Module) and any(m in sharded_by_section for m in model.modules())


def _refuse_ignored_section(model: Any, config: Any) -> None:
    # Where the section reached a model, others are those that it should not change, such as TRL's
    # reference models.
    if not isinstance(config, Mapping) or SECTION not in config or sharded_by_section:
        return
    raise ValueError(
        f"The section `{SECTION}` of the DeepSpeed config must be applied to the model before its "
        "engine is made, but nothing did so: its tables would stay whole. Call "
        "`tp_embed.integrations.deepspeed.install()` at the start of the program, start it by "
        "`python -m tp_embed.run`, or leave the section out."
    )


check_before_building(_refuse_ignored_section)
