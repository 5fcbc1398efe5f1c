"""The layout of padded and packed batches: where sequences begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import final

import torch
from torch import Tensor


@final
class BatchLayout:
    """Describes which positions of a batch hold which sequence, and which are padding.

    A *padded* batch has the shape ``(N, S, *)``: one sequence per row, padded to the width S.
    A *packed* batch has the shape ``(S, *)``: concatenated sequences, padded at the end.

    :param shape: the leading dimensions: ``(N, S)``, or ``(S,)`` if ``packed``.
    :param seq_lens: the length of each sequence, in positions, each at least 1; if ``None``, the
        batch is full: N sequences of length S, or a single packed one.
    :param packed: whether the sequences are concatenated in one dimension.
    :param device: the device of the tensor properties.
    :raises ValueError: the shape does not fit ``packed``, or the lengths do not fit the shape.
    :raises TypeError: a length is not an integer.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seq_lens: Sequence[int] | None,
        *,
        packed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        width = _check_shape(shape, packed)
        seq_lens = _check_lengths(seq_lens, shape, packed)

        # (S)
        columns = torch.arange(width, device=device)

        if packed:
            begin_indices = [0]
            for seq_len in seq_lens:
                begin_indices.append(begin_indices[-1] + seq_len)

            lens = torch.tensor(seq_lens, device=device)
            starts = torch.tensor(begin_indices[:-1], device=device)
            end = begin_indices[-1]

            # (S)
            positions = torch.full((width,), -1, dtype=torch.int64, device=device)
            positions[:end] = columns[:end] - starts.repeat_interleave(lens, output_size=end)
        else:
            begin_indices = [row * width for row in range(shape[0] + 1)]

            lens = torch.tensor(seq_lens, dtype=torch.int64, device=device)

            # (N, S)
            positions = torch.where(columns < lens[:, None], columns, -1)

        self._width = width
        self._packed = packed
        self._padded = sum(seq_lens) < positions.numel()
        self._seq_lens = tuple(seq_lens)
        self._seq_begin_indices = tuple(begin_indices)
        self._seq_lens_pt = lens.to(torch.int32)
        self._seq_begin_indices_pt = torch.tensor(begin_indices, dtype=torch.int32, device=device)
        self._position_indices = positions

    @staticmethod
    def of(
        batch: Tensor, seq_lens: Sequence[int] | None = None, *, packed: bool = False
    ) -> BatchLayout:
        """Returns the layout of ``batch``, from its first two dimensions (first one if ``packed``).

        :param batch: the batch. *Shape:* :math:`(N,S,*)`, or :math:`(S,*)` if ``packed``.
        :param seq_lens: the length of each sequence; if ``None``, there is no padding.
        :raises ValueError, TypeError: as the constructor.
        """
        shape = batch.shape[: 1 if packed else 2]

        return BatchLayout(shape, seq_lens, packed=packed, device=batch.device)

    @property
    def width(self) -> int:
        """S, the number of positions along the sequence dimension."""
        return self._width

    @property
    def seq_begin_indices(self) -> Sequence[int]:
        """Where each sequence begins in the flattened batch, followed by where the next one would
        begin (the ``cu_seqlens`` of variable-length attention)."""
        return self._seq_begin_indices

    @property
    def seq_begin_indices_pt(self) -> Tensor:
        """:attr:`seq_begin_indices` as a tensor. *Shape:* :math:`(N+1)`. *Dtype:* int32."""
        return self._seq_begin_indices_pt

    @property
    def seq_lens(self) -> Sequence[int]:
        """The length of each sequence, in positions."""
        return self._seq_lens

    @property
    def seq_lens_pt(self) -> Tensor:
        """:attr:`seq_lens` as a tensor. *Shape:* :math:`(N)`. *Dtype:* int32."""
        return self._seq_lens_pt

    @property
    def min_seq_len(self) -> int:
        """The length of the shortest sequence; the width if there is none."""
        return min(self._seq_lens, default=self._width)

    @property
    def max_seq_len(self) -> int:
        """The length of the longest sequence; 0 if there is none."""
        return max(self._seq_lens, default=0)

    @property
    def position_indices(self) -> Tensor:
        """The position of each element within its sequence, -1 at padding.

        *Shape:* :math:`(N,S)`, or :math:`(S)` if packed. *Dtype:* int64.
        """
        return self._position_indices

    @property
    def padded(self) -> bool:
        """Whether any position is padding."""
        return self._padded

    @property
    def packed(self) -> bool:
        """Whether the sequences are concatenated in one dimension."""
        return self._packed

    def __repr__(self) -> str:
        return (
            f"BatchLayout(width={self._width}, "
            f"seq_begin_indices={list(self._seq_begin_indices)}, seq_lens={list(self._seq_lens)}, "
            f"min_seq_len={self.min_seq_len}, max_seq_len={self.max_seq_len}, "
            f"padded={self._padded}, packed={self._packed})"
        )


def _check_shape(shape: Sequence[int], packed: bool) -> int:
    """Returns the width."""
    num_dims = 1 if packed else 2
    if len(shape) != num_dims:
        raise ValueError(
            f"`shape` must be {num_dims} dimensional for a "
            f"{'packed' if packed else 'padded'} batch, "
            f"but is {len(shape)} dimensional instead."
        )

    width = shape[-1]
    if width < 1:
        raise ValueError(
            f"`shape[{num_dims - 1}]` must be greater than or equal to 1, but is {width} instead."
        )

    return width


def _check_lengths(
    seq_lens: Sequence[int] | None, shape: Sequence[int], packed: bool
) -> Sequence[int]:
    """Returns the length of each sequence."""
    width = shape[-1]
    if seq_lens is None:
        seq_lens = [width] if packed else [width] * shape[0]
    else:
        try:
            seq_lens = [index(seq_len) for seq_len in seq_lens]
        except TypeError as e:
            raise TypeError(f"`seq_lens` must hold integers, but is {seq_lens} instead.") from e

    for idx, seq_len in enumerate(seq_lens):
        if not 1 <= seq_len <= width:
            raise ValueError(
                f"All lengths in `seq_lens` must be in [1, {width}] (the width of the batch), "
                f"but the length at index {idx} is {seq_len} instead."
            )

    if packed and not seq_lens:
        raise ValueError(
            "`seq_lens` must hold at least one length for a packed batch, but is empty."
        )
    if packed and sum(seq_lens) > width:
        raise ValueError(
            f"`sum(seq_lens)` must be less than or equal to `shape[0]` ({width}), "
            f"but is {sum(seq_lens)} instead."
        )
    if not packed and len(seq_lens) != shape[0]:
        raise ValueError(
            f"`len(seq_lens)` must be equal to `shape[0]` ({shape[0]}), "
            f"but is {len(seq_lens)} instead."
        )

    return seq_lens
