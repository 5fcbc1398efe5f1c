"""Reads, converts and compares checkpoints, and gathers state dicts of sharded tables.

Names are imported on first use, so that the command line parses its arguments without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tp_embed.state_dict.hooks import Mode, full_state_dict, hook_state_dict

    from .compare import Difference, differences
    from .contents import Checkpoint, Key, ReadOptions
    from .conversion import Plan, Request, plan
    from .cuts import Cut, Rule
    from .errors import CheckpointError, MismatchError, UnsafeCheckpointError
    from .formats import read
    from .writing import convert

_MODULE_OF = {
    "Checkpoint": ".contents",
    "CheckpointError": ".errors",
    "Cut": ".cuts",
    "Difference": ".compare",
    "Key": ".contents",
    "MismatchError": ".errors",
    "Mode": "tp_embed.state_dict.hooks",
    "Plan": ".conversion",
    "ReadOptions": ".contents",
    "Request": ".conversion",
    "Rule": ".cuts",
    "UnsafeCheckpointError": ".errors",
    "convert": ".writing",
    "differences": ".compare",
    "full_state_dict": "tp_embed.state_dict.hooks",
    "hook_state_dict": "tp_embed.state_dict.hooks",
    "plan": ".conversion",
    "read": ".formats",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Cut",
    "Difference",
    "Key",
    "MismatchError",
    "Mode",
    "Plan",
    "ReadOptions",
    "Request",
    "Rule",
    "UnsafeCheckpointError",
    "convert",
    "differences",
    "full_state_dict",
    "hook_state_dict",
    "plan",
    "read",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name], __name__), name)
