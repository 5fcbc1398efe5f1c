"""Arrays that wrap others: several copies, a cast, a check for NaNs, and values in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from tp_embed.optim.masters import join

from ..errors import CheckpointError
from .arrays import Array, Index, same_bits


@final
class Copies(Array):
    """Several copies of one array. Reading compares them.

    :param what: the array's name in messages.
    :param of: where the copies are, for messages.
    :param fix: what to do if they differ, for messages.
    :raises CheckpointError: there is no copy, or shapes or dtypes differ; on reading, values
        differ.
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
                    f"{self._expected}but number {number} differs from number 0. {self._fix}"
                )

    def write(self, start: Index, values: Tensor) -> None:
        for copy in self._copies:
            copy.write(start, values)


@final
class Cast(Array):
    """``array`` in another dtype.

    :raises CheckpointError: on reading a finite value outside the range of the dtype.
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
class Held(Array):
    """A tensor in memory, read-only."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape, values.dtype)
        self._values = values

    def read(self, start: Index, out: Tensor) -> None:
        box = tuple(slice(i, i + n) for i, n in zip(start, out.shape, strict=True))
        out.copy_(self._values[box])

    def write(self, start: Index, values: Tensor) -> None:
        raise NotImplementedError("Values in memory are read-only.")


@final
class Widened(Array):
    """The fp32 values of a weight in bf16 and the remainders that an optimizer of
    :mod:`tp_embed.optim` keeps, read-only."""

    def __init__(self, weight: Array, remainder: Array) -> None:
        super().__init__(weight.shape, torch.float32)
        self._weight, self._remainder = weight, remainder

    def read(self, start: Index, out: Tensor) -> None:
        parts = [torch.empty(out.shape, dtype=a.dtype) for a in (self._weight, self._remainder)]
        for array, part in zip((self._weight, self._remainder), parts, strict=True):
            array.read(start, part)
        out.copy_(join(*parts))

    def write(self, start: Index, values: Tensor) -> None:
        raise NotImplementedError("A weight in bf16 can't be written through its fp32 values.")


def values_of(weight: Array, master: Array | None, remainder: Array | None) -> Array:
    """Returns the values of a table at the best precision of what an optimizer of
    :mod:`tp_embed.optim` keeps."""
    if remainder is not None:
        return Widened(weight, remainder)
    return weight if master is None else master


@final
class NoNan(Array):
    """``array``, read-only, without NaNs.

    :raises CheckpointError: on reading a NaN.
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
        raise NotImplementedError("A checked array is read-only.")


def _is_finite(tensor: Tensor) -> Tensor:
    """Does :func:`torch.isfinite` for all dtypes."""
    return torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
