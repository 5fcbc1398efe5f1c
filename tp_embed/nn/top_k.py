"""The largest logits of each token, from logits that are sharded over a gang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.gang.collectives import gather_columns, reduce_partial
from tp_embed.nn.columns import add_to_picked, parts_of, picked
from tp_embed.partition import Partition


def check_k(k: int, classes: Partition) -> None:
    """
    :raises ValueError: there are no ``k`` classes.
    """
    if not 0 < k <= classes.size:
        raise ValueError(f"`k` must be in [1, {classes.size}] (the classes), but is {k} instead.")


def local_top_k(
    z: Tensor, k: int, own: range, classes: Partition, *, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Finds the k largest logits of this rank, of equal ones those with the lowest ids, without
    synchronizing with an accelerator.

    :param z: *Shape:* :math:`(V_{rank},n)`.
    :param in_place: overwrites ``z``; else sorts all logits, as transforms and graphs can.
    :returns: logits and ids, in the order of the ids, padded to the same width on every rank by
        logits of -inf. *Shape:* :math:`(n,min(k,ceil(V/P)))`.
    """
    width = min(k, len(own))
    if in_place:
        values, rows = z.T.topk(width, dim=-1)
        if 0 < width < len(own):
            rows = _lowest_of_equal(z, values, rows)
        rows, order = rows.sort(dim=-1)
        values = values.gather(1, order)
    else:
        rows = z.sort(dim=0, descending=True, stable=True).indices[:width].T.sort(dim=-1).values
        values = z.T.gather(1, rows)
    missing = min(k, classes.block) - width
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return values, torch.nn.functional.pad(rows + own.start, (0, missing), value=classes.size)


def _lowest_of_equal(z: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Replaces the ``rows`` of logits that equal the smallest of ``values``, since
    :func:`torch.topk` takes any of them. Overwrites ``z``."""
    smallest = values[:, -1]
    taken = (values == smallest[:, None]).sum(-1)
    equal = sum((z[part] == smallest).sum(0) for part in parts_of(z, split=True))
    if z.device.type == "cpu" and not (equal > taken).any():
        return rows
    # In the memory of the logits: the negative row where they are equal.
    integer = torch.int32 if z.dtype == torch.float32 else torch.int64
    keys = z.view(integer)
    for part in parts_of(z, split=True):
        ids = torch.arange(part.start, part.start + len(z[part]), device=z.device, dtype=integer)
        is_equal = z[part] == smallest
        keys[part] = torch.where(is_equal, -ids[:, None], torch.iinfo(integer).min)
    lowest = keys.T.topk(values.size(1), dim=-1).indices
    # The equal ones are the last.
    place = torch.arange(values.size(1), device=z.device) - (values.size(1) - taken)[:, None]
    return torch.where(place < 0, rows, lowest.gather(1, place.clamp_min(0)))


def merged_top_k(values: Tensor, ids: Tensor, k: int, gang: Gang) -> tuple[Tensor, Tensor]:
    """Merges the results of :func:`local_top_k` of all ranks.

    Does two all-gathers, of k numbers and k int64 ids per token and rank.

    :returns: logits, largest first, and ids. *Shape:* :math:`(N,k)`.
    """
    ranks = Partition(gang.size * values.size(1), gang.size)
    values = gather_columns(values, gang, ranks)
    ids = gather_columns(ids, gang, ranks)
    # Of equal values the lowest id comes first; padding, whose id is none, comes last.
    ids, order = ids.sort(dim=-1, stable=True)
    values = values.gather(1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), ids.gather(1, order)[:, :k].contiguous()


@dataclass(frozen=True)
class Chosen:
    """The logits of K classes of each token.

    :param ids: *Shape:* :math:`(N,K)`.
    """

    ids: Tensor

    def compose(
        self, logits: Sequence[Tensor], own: range, gang: Gang, classes: Partition
    ) -> Tensor:
        """Computes the logits, *Shape:* :math:`(N,K)`, with differentiable operations, from those
        of this rank, *Shape:* :math:`(V_{rank},N)`. Does an all-reduce of N K numbers."""
        return reduce_partial(picked(logits[0], self.ids, own), gang).T

    def scatter(self, z: Tensor, classes: range, grad: Tensor) -> None:
        """Overwrites ``z``, *Shape:* :math:`(V_{block},N)`, with the gradient of the logits of
        ``classes``, from that of the chosen ones, *Shape:* :math:`(N,K)`."""
        z.zero_()
        add_to_picked(z, self.ids, classes, grad)
