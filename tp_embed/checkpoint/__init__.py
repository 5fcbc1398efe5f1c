"""Checkpoints: state dicts of models with sharded tables, and files of any format."""

from .compare import Difference, differences
from .convert import convert
from .cuts import Cut, Rule
from .errors import CheckpointError, MismatchError, UnsafeCheckpointError
from .formats import read
from .hooks import Mode, full_state_dict, hook_state_dict
from .logical import Checkpoint, Key, ReadOptions
from .planning import Plan, Request, plan

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
