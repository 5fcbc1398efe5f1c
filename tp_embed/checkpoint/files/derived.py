"""Arrays that stand for others: the same in several places, in another dtype, or with a check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..errors import CheckpointError
from .arrays import Array, Index, same_bits


@final
class Copies(Array):
    """The same array in several places. Reading compares them.

    :param what: what a message calls it.
    :param of: where the places are, for a message.
    :param fix: what to do if they differ, for a message.
    :raises CheckpointError: there are none, or they have different shapes or dtypes; when they are
        read, if they differ in their values.
    """

    def __init__(
        self,
        what: str,
        copies: Sequence[Array],
        of: str = "on every rank",
        fix: str = "If it is cut over the ranks, say how with `--rules`.",
    ) -> None:
        self._expected, self._fix = f"`{what}` must be the same {of}, ", fix
        if len({(copy.shape, copy.dtype) for copy in copies}) != 1:
            raise CheckpointError(f"{self._expected}but is {list(copies)}. {self._fix}")
        super().__init__(copies[0].shape, copies[0].dtype)
        self._copies = copies

    def read(self, start: Index, out: Tensor) -> None:
        self._copies[0].read(start, out)
        for number, copy in enumerate(self._copies[1:], 1):
            other = torch.empty(out.shape, dtype=out.dtype)
            copy.read(start, other)
            if not same_bits(out, other):
                raise CheckpointError(
                    f"{self._expected}but number {number} has other values than number 0. "
                    f"{self._fix}"
                )

    def write(self, start: Index, values: Tensor) -> None:
        for copy in self._copies:
            copy.write(start, values)


@final
class Cast(Array):
    """``array`` in another dtype.

    :raises CheckpointError: when a finite value is read that the dtype does not reach.
    """

    def __init__(self, what: str, array: Array, dtype: torch.dtype) -> None:
        super().__init__(array.shape, dtype)
        self._what = what
        self._array = array

    def read(self, start: Index, out: Tensor) -> None:
        values = torch.empty(out.shape, dtype=self._array.dtype)
        self._array.read(start, values)
        out.copy_(values)
        if (~_is_finite(out) & _is_finite(values)).any():
            raise CheckpointError(
                f"The values of `{self._what}` must be in the range of {self.dtype}, but the "
                f"largest is {float(values.nan_to_num(0, 0, 0).abs().max()):.4g}. Choose a dtype "
                "with a wider range: `bfloat16` or `float32`."
            )

    def write(self, start: Index, values: Tensor) -> None:
        self._array.write(start, values.to(self._array.dtype))


@final
class NoNan(Array):
    """``array``, to be read only, if none of its values is not a number.

    :raises CheckpointError: when one is read.
    """

    def __init__(self, what: str, array: Array) -> None:
        super().__init__(array.shape, array.dtype)
        self._what = what
        self._array = array

    def read(self, start: Index, out: Tensor) -> None:
        self._array.read(start, out)
        if torch.isnan(out).any():
            raise CheckpointError(
                f"The values of `{self._what}` must be numbers, but some are NaN. Take an earlier "
                "checkpoint, or pass `--nan keep`."
            )

    def write(self, start: Index, values: Tensor) -> None:
        raise NotImplementedError("A checked array is read only.")


def _is_finite(tensor: Tensor) -> Tensor:
    """As :func:`torch.isfinite`, which does not know all dtypes."""
    return torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
