"""Values of checkpoint options. Imports no torch, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# Format -> module of `formats`. Detection tries them in this order, the most specific first.
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
