"""Replaces the class of objects by a subclass with mixins."""

from __future__ import annotations

from functools import cache
from typing import Any


def give_class(module: Any, *mixins: type) -> None:
    """Replaces the class of ``module`` by a subclass of the same name with ``mixins`` first."""
    if not isinstance(module, mixins):
        base: Any = type(module)
        module.__class__ = _class_with(base, mixins)


@cache
def _class_with(base: type, mixins: tuple[type, ...]) -> type:
    # transformers looks up losses, plans and `config.json` by the name of a class.
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_tp_embed_base": (base, mixins),
    }
    return type(base.__name__, (*mixins, base), attributes)


def _reduce(self: Any, protocol: Any) -> Any:
    # pickle looks up classes by name, and would find the base.
    base, mixins = type(self)._tp_embed_base
    _, _, *state = super(type(self), self).__reduce_ex__(protocol)
    return (_new, (base, mixins), *state)


def _new(base: type, mixins: tuple[type, ...]) -> Any:
    made: Any = _class_with(base, mixins)
    return made.__new__(made)
