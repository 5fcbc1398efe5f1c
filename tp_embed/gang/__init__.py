"""Gangs: the processes that a table is sharded over, and their collectives."""

from .base import CollectiveHook, Gang, GangError, ReduceOperation
from .fake import FakeGang
from .process_group import ProcessGroupGang

__all__ = [
    "CollectiveHook",
    "FakeGang",
    "Gang",
    "GangError",
    "ProcessGroupGang",
    "ReduceOperation",
]
