"""Options of lookups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from tp_embed.lookup.exchange import Dedup
from tp_embed.lookup.same_ids import check_interval

Output = Literal["replicated", "sequence", "shard"]


@dataclass(frozen=True, eq=False)
class LookupOptions:
    """Options of the output and the gradient of a table; the keywords of
    :class:`~tp_embed.ShardedEmbedding`."""

    output: Output = "replicated"
    dedup: Dedup = "auto"
    sparse: bool = False
    reuse_grad: bool = False
    scale: float | Tensor | None = None
    train_rows: Tensor | None = None
    check_ids: int | None = None

    def __post_init__(self) -> None:
        """
        :raises ValueError: an option has an invalid value, or options exclude each other.
        """
        if self.dedup not in ("auto", True, False):
            raise ValueError(
                f"`dedup` must be 'auto', True or False, but is {self.dedup!r} instead."
            )
        if self.sparse and self.reuse_grad:
            raise ValueError(
                "`reuse_grad` must be False with `sparse`, but is True instead. It applies only to "
                "dense gradients."
            )
        is_number = isinstance(self.scale, (int, float)) or (
            isinstance(self.scale, Tensor) and not self.scale.ndim
        )
        if self.scale is not None and not is_number:
            raise ValueError(
                f"`scale` must be a number or a tensor of the shape (), but is {self.scale!r} "
                "instead."
            )
        check_interval(self.check_ids)

    def of_whole(self) -> dict[str, Any]:
        """Returns the options of a table on one rank, as keywords."""
        return {name: getattr(self, name) for name in _OF_WHOLE}

    def of_shard(self) -> dict[str, Any]:
        """Returns all options, as keywords."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


_OF_WHOLE = ("sparse", "reuse_grad", "scale", "train_rows")
