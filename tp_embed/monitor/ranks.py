"""Gathers facts about the ranks of a run, without secrets."""

from __future__ import annotations

import json
import platform
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn import Module

from tp_embed._torch_private import default_store
from tp_embed.gang import Gang, GangError

_SECRET = re.compile(
    r"(api|access)[-_]?key|password|secret|(^|(api|auth|access|hf|hub)[-_])token$",
    re.IGNORECASE,
)
_LEFT_OUT = "(left out)"


def meet(gang: Gang, info: dict[str, Any], timeout: timedelta) -> list[dict[str, Any]]:
    """Gathers ``info`` of each rank of the job, by rank. All ranks must call it.

    Uses the store, since a collective would hang, or fail without a reason, if a script called this
    on the first rank only.

    :raises GangError: a rank has not called it within ``timeout``.
    """
    if gang.size == 1:
        return [info]
    store = default_store()
    count = store.add(f"tp_embed/monitors/{gang.rank}", 1)  # Counts calls of this rank.
    keys = [f"tp_embed/monitor/{count}/{rank}" for rank in range(gang.size)]
    store.set(keys[gang.rank], json.dumps(info))
    try:
        store.wait(keys, timeout)
    except RuntimeError as e:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise GangError(
            f"The ranks {missing} have not made a `Monitor` within {timeout} of rank {gang.rank}. "
            "Make one on every rank, at the same place of the script, not only on the rank that "
            "writes."
        ) from e
    return [json.loads(text) for text in store.multi_get(keys)]


def describe_rank(tables: Mapping[str, Module], device: torch.device) -> dict[str, Any]:
    """Returns the host, device and tables of this rank."""
    is_cpu = device.type == "cpu"
    return {
        "host": socket.gethostname(),
        "device": "CPU" if is_cpu else torch.get_device_module(device).get_device_name(device),
        "tables": {
            name: f"{type(module).__name__}({module.extra_repr()})"
            for name, module in tables.items()
        },
    }


def describe_run(
    infos: list[dict[str, Any]], every: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the log entry for the start of a run."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": _command_without_secrets(sys.argv),
        "every": every,
        "ranks": [{"host": info["host"], "device": info["device"]} for info in infos],
        # Reversed, so that the first rank that has a table describes it.
        "tables": {name: table for info in infos[::-1] for name, table in info["tables"].items()},
        "versions": {
            "python": platform.python_version(),
            **_versions(("torch", "deepspeed", "transformers", "tp-embed")),
        },
        **_without_secrets(about),
    }


def _without_secrets(values: Any) -> Any:
    """Replaces values of a config whose names look secret."""
    if isinstance(values, list | tuple):
        return [_without_secrets(value) for value in values]
    if not isinstance(values, Mapping):
        return values
    return {
        key: _LEFT_OUT if value and _is_secret(str(key)) else _without_secrets(value)
        for key, value in values.items()
    }


def _command_without_secrets(arguments: Iterable[str]) -> list[str]:
    """Replaces secret values in `name=value` and `--name value`."""
    found: list[str] = []
    is_value = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and _is_secret(name):
            found.append(f"{name}={_LEFT_OUT}")
        else:
            found.append(_LEFT_OUT if is_value else argument)
        is_value = argument.startswith("-") and not equals and _is_secret(name)
    return found


def _is_secret(name: str) -> bool:
    return _SECRET.search(name.rpartition(".")[2].lstrip("-+")) is not None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
