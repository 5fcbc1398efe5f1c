"""What every layer that is sharded over a gang has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor
from torch.nn import Module

from tp_embed.gang import Gang
from tp_embed.partition import Partition


class GangLayer(Module):
    """A module with Parameters that are sharded over ``gang``.

    The gang adopts it when its Parameters exist, which is for the subclass to see to, and again
    whenever they may have been replaced by others, which the gang has not marked.
    """

    gang: Gang

    def _shard_repr(self, dim: int, partition: Partition) -> str:
        """What this rank holds, for ``extra_repr()``."""
        own = partition.shard(self.gang.rank)
        name = "columns" if dim else "rows"
        return f"{name}={own.start}:{own.stop}, shard={self.gang.rank}/{self.gang.size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.gang.adopt(self)  # `to_empty()` and the like replace Parameters.
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.gang.adopt(self)  # A copied Parameter has lost the marks of its gang.

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.gang.adopt(self)  # `assign=True` replaces Parameters.
