"""Calls a module again, later: in the modes of the first call, and for engines that gather its
weights around its calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

# The packages whose forward hooks gather weights; integrations add theirs.
ENGINES = {"torch.distributed"}


class Modes(NamedTuple):
    """The modes of autograd and autocast in which a head was called."""

    grad: bool
    device: str
    autocast: tuple[bool, torch.dtype] | None

    @classmethod
    def of(cls, x: Tensor) -> Modes:
        device, autocast = x.device.type, None
        if torch.amp.is_autocast_available(device):
            autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(torch.is_grad_enabled(), device, autocast)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Computes as logits would have been computed; without a gradient, if it is off now."""
        enabled, dtype = self.autocast or (False, torch.float32)
        is_changed = self.autocast is not None and (
            enabled != torch.is_autocast_enabled(self.device)
            or (enabled and dtype != torch.get_autocast_dtype(self.device))
        )
        cast_as_before = (
            torch.autocast(self.device, dtype, enabled) if is_changed else nullcontext()
        )
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()), cast_as_before:
            yield


@contextmanager
def only_engine_hooks(module: Module) -> Iterator[None]:
    """Leaves out forward hooks that are not an engine's: they have seen the first call, and would
    change inputs and outputs twice."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    if all(map(_is_of_engine, (*before.values(), *after.values()))):
        yield
        return
    try:
        module._forward_pre_hooks, module._forward_hooks = _of_engines(before), _of_engines(after)
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = before, after


def _of_engines(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((key, hook) for key, hook in hooks.items() if _is_of_engine(hook))


def _is_of_engine(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or ""
    return any(f"{module}.".startswith(f"{engine}.") for engine in ENGINES)
