"""Reads and writes the output of DeepSpeed's ``engine.save_checkpoint()``, at every ZeRO stage.

A checkpoint has a directory for each tag, and a file ``latest`` with the name of one. A tag has a
file ``mp_rank_<TP>_model_states.pt`` for each tensor-parallel rank (at ZeRO 3
``zero_pp_rank_<DP>_mp_rank_<TP>_model_states.pt`` for each rank), and from ZeRO 1 on
``[bf16_]zero_pp_rank_<DP>_mp_rank_<TP>_optim_states.pt`` for each rank. See ``DeepSpeedEngine`` in
https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/engine.py.
"""

from __future__ import annotations

from pathlib import Path

from ...contents import WEIGHT
from .files import is_tag
from .reading import read
from .writing import lay_out

NAME = "deepspeed"
IS_FILE = False
HAS_RANKS = True
HAS_OPTIMIZER = True
HAS_EXTRA = True
MAIN = WEIGHT

__all__ = [
    "HAS_EXTRA",
    "HAS_OPTIMIZER",
    "HAS_RANKS",
    "IS_FILE",
    "MAIN",
    "NAME",
    "lay_out",
    "read",
    "recognises",
]


def recognises(path: Path) -> bool:
    """Returns whether ``path`` is a checkpoint directory of DeepSpeed, or a tag in one."""
    return path.is_dir() and (
        is_tag(path) or any(is_tag(tag) for tag in sorted(path.iterdir()) if tag.is_dir())
    )
