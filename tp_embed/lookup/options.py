"""Options of lookups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from tp_embed.lookup.exchange import Dedup
from tp_embed.lookup.same_ids import check_interval

Output = Literal["replicated", "sequence", "shard"]
GradReduction = Literal["sum", "mean"]


@dataclass(frozen=True, eq=False)
class LookupOptions:
    """Options of the output and the gradient of a table; the keywords of
    :class:`~tp_embed.ShardedEmbedding` and :class:`~tp_embed.RowWiseEmbedding`, whose output is
    ``"own"``: the rows of each rank's own ids."""

    output: Output | Literal["own"] = "replicated"
    dedup: Dedup = "auto"
    sparse: bool = False
    reuse_grad: bool = False
    scale: float | Tensor | None = None
    train_rows: Tensor | None = None
    check_ids: int | None = None
    grad_reduction: GradReduction = "sum"

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
        if self.grad_reduction not in get_args(GradReduction):
            raise ValueError(
                f"`grad_reduction` must be one of {get_args(GradReduction)}, but is "
                f"{self.grad_reduction!r} instead."
            )

    def of_whole(self) -> dict[str, Any]:
        """Returns the options of a table on one rank, as keywords."""
        return {name: getattr(self, name) for name in _OF_WHOLE}


_OF_WHOLE = ("sparse", "reuse_grad", "scale", "train_rows")
