"""Hidden states and labels of this rank's positions, for sequence parallelism, and losses over the
positions of several ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_embed.gang import Gang
from tp_embed.gang.collectives import all_gather_columns, copy_to_gang, reduce_partial
from tp_embed.partition import Partition

__all__ = ["mean_over_sequence"]


def mean_over_sequence(
    total: Tensor, count: Tensor | int, gang: Gang, *, averaged: bool = False
) -> Tensor:
    """Computes the mean loss over the tokens of all ranks of a sequence group, for models that
    compute the losses of each rank's positions by themselves, as with Ulysses (Jacobs et al.,
    2023).

    The gradient is the one of this rank's tokens in that mean, and adds up over the group to the
    gradient of one process. DeepSpeed adds up gradients over the sequence group of its ``mpu``,
    except at ZeRO 3. Pass ``averaged=True`` where the engine averages over the ranks of the group,
    as ZeRO 3 and DDP over all ranks do; the gradient is then larger by the factor P.

    Does two all-reduces of one number; with ``averaged`` a third one in the backward.

    :param total: the sum of the losses of this rank's tokens. *Shape:* :math:`()`.
    :param count: how many tokens of this rank have a loss, such as ``(target != -100).sum()``.
    :param gang: the sequence group, such as ``ProcessGroupGang(group, device)``. It may be, but
        need not be, the gang of the table.
    :returns: the same on every rank; NaN if no rank has a token. *Shape:* :math:`()`.
    """
    tokens = torch.as_tensor(count, device=total.device).detach().clone()
    if gang.size > 1:
        gang.all_reduce(tokens)
    total = reduce_partial(total.clone(), gang)
    if averaged:
        total = copy_to_gang(total, gang)
    nan = total.new_zeros(()).masked_fill(tokens == 0, torch.nan)  # With a zero gradient.
    return total / tokens.clamp_min(1) + nan


def blocks_of_positions(x: Tensor, length: int | None, gang: Gang) -> Partition:
    """Returns how positions, the second to last dimension of ``x``, are split over ``gang``.

    :param length: the number of positions of all ranks; if ``None``, ranks exchange how many each
        holds, in an all-gather of P numbers, which waits for the device.
    :raises ValueError: ``x`` has no such dimension, or ranks hold other blocks.
    """
    if x.ndim < 2:
        raise ValueError(
            "`x` must have the shape (*, positions, E) for `input='sequence'`, but has "
            f"{tuple(x.shape)} instead."
        )
    held = x.size(-2)
    if length is None:
        sizes = _exchange(held, gang)
        positions = Partition(sum(sizes), gang.size)
        if tuple(sizes) != positions.sizes:
            raise ValueError(
                f"Ranks must hold {positions.sizes} positions of {positions.size}, as "
                f"`output='sequence'` gives them, but hold {tuple(sizes)} instead."
            )
        return positions
    positions = Partition(length, gang.size)
    own = len(positions.shard(gang.rank))
    if held != own:
        raise ValueError(
            f"`x` must hold the {own} positions of this rank, of {length} in all, for "
            f"`input='sequence'`, but holds {held} instead. For hidden states of all positions "
            "leave `input` out; for a `target` of this rank's positions pass `length`."
        )
    return positions


@torch.compiler.disable(reason="Pass `length`.")  # type: ignore[untyped-decorator]
def _exchange(held: int, gang: Gang) -> list[int]:
    if gang.size == 1:
        return [held]
    sizes = torch.empty(gang.size, 1, dtype=torch.int64, device=gang.device)
    gang.all_gather(sizes, sizes.new_full((1,), held))
    found: list[int] = sizes.flatten().tolist()
    return found


def whole_target(target: Tensor, length: int | None, gang: Gang) -> Tensor:
    """Returns the labels of all positions: ``target``, or, if ``length`` is given, the labels that
    an all-gather collects from the ranks.

    :param target: all positions; with ``length`` this rank's. *Shape:* :math:`(*,S)`.
    :raises ValueError: ``target`` has no positions, or not this rank's.
    """
    if not target.ndim:
        raise ValueError(
            "`target` must have the shape (*, positions) for `input='sequence'`, but has () "
            "instead."
        )
    if length is None:
        return target
    positions = Partition(length, gang.size)
    own = len(positions.shard(gang.rank))
    if target.size(-1) != own:
        raise ValueError(
            f"`target` must hold the {own} positions of this rank, of {length} in all, but holds "
            f"{target.size(-1)} instead. For labels of all positions leave `length` out."
        )
    return all_gather_columns(target, gang, positions)
