"""Finds the states in memory that go to files with their table."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tp_embed.mapped.store import RowStore

_OPTIMIZERS: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def note_optimizer(optimizer: Optimizer) -> None:
    """Makes :func:`adopt_states` look for states in ``optimizer``."""
    _OPTIMIZERS.add(optimizer)


def adopt_states(store: RowStore, parameter: Tensor) -> list[dict[str, Any]]:
    """Copies the states of ``parameter`` to the files of ``store``.

    :returns: the states, to be replaced by :func:`replace_states`.
    :raises ValueError: the files have a table already, or its fp32 values are of another dtype.
    """
    found = []
    for optimizer in list(_OPTIMIZERS):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        if "step" in state:
            if not store.is_new:
                raise ValueError(
                    f"The optimizer of a table that `{store.path}` has already must be a new one, "
                    "which goes on with its states there, but has states of "
                    f"{state['step']} steps. Make the optimizer again, or map the table to a new "
                    "directory."
                )
            if parameter.dtype != store.weight.dtype:
                raise ValueError(
                    f"`dtype` must be {parameter.dtype}, since the optimizer has states for it, "
                    f"but is {store.weight.dtype} instead. Leave it out, or map the table before "
                    "its first step."
                )
            _copy(store, type(optimizer).__name__, state)
            found.append(state)
    return found


def _copy(store: RowStore, optimizer: str, state: Mapping[str, Any]) -> None:
    store.claim(optimizer)
    copies = {
        name: store.zeros(name, tuple(value.shape), value.dtype).copy_(value)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    with store.rewriting({**state, **copies}):
        pass


def replace_states(states: list[dict[str, Any]], held: Mapping[str, Any]) -> None:
    """Gives optimizers the states in files."""
    for state in states:
        state.clear()
        state.update(held)
