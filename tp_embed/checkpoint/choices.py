"""What options of checkpoints may be. The command line reads them without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# Each format is a module of `formats`. They are tried in this order: what has a mark of its own
# comes before what has not.
FORMATS = {
    "tp-embed": "tp_embed",
    "universal": "universal",
    "deepspeed": "deepspeed",
    "dcp": "dcp",
    "megatron": "megatron",
    "fairseq2": "fairseq2",
    "hf": "hf",
    "pt": "pt",
}

Dim = Literal["vocab", "embed"]
DIMS: Mapping[Dim, int] = {"vocab": 0, "embed": 1}

NanPolicy = Literal["keep", "refuse"]
