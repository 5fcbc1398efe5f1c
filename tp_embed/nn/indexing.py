"""What an index does to the last dimension of a tensor, which logits have for their classes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["index_of_last"]


def index_of_last(index: object, ndim: int) -> object:
    """Returns the part of ``index`` that indexes the last of ``ndim`` dimensions, or adds one after
    it; ``slice(None)`` if none does."""
    *parts, last = index if isinstance(index, tuple) and index else (index,)
    has_ellipsis = any(part is Ellipsis for part in parts)
    if has_ellipsis or sum(map(_dims_of, (*parts, last))) >= ndim:
        return last
    return slice(None)


def _dims_of(part: object) -> int:
    """Returns how many dimensions a part of an index stands for, at least."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, list) or hasattr(part, "__array__"):
        part = torch.as_tensor(part)
    if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
        return part.ndim
    return 1
