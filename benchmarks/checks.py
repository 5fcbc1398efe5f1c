"""Checks outputs and gradients against ``torch.nn.Embedding``, so that no wrong layer is timed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

# Rows of a gradient to check at a time.
_CHUNK = 4096


class Reference:
    """Output and gradient of ``torch.nn.Embedding`` for given ids and output gradient.

    :param table: *Shape:* (V, E).
    :param ids: *Shape:* (B, S).
    :param grad: *Shape:* (B, S, E).
    """

    def __init__(self, table: Tensor, ids: Tensor, grad: Tensor) -> None:
        embed = torch.nn.Embedding.from_pretrained(table, freeze=False)
        output = embed(ids)
        output.backward(grad)
        self.output = output.detach()
        self.used, inverse = ids.unique(return_inverse=True)
        # The gradient of the used rows, in fp64. (U, E)
        self.sums = grad.new_zeros((len(self.used), grad.size(-1)), dtype=torch.float64)
        self.sums.index_add_(0, inverse.flatten(), grad.flatten(0, -2).double())
        self.norm = float(self.sums.norm())
        # Errors relative to the norm: the exact gradient rounded to this dtype, and torch's.
        self.rounding = float((self.sums.to(grad.dtype) - self.sums).norm()) / self.norm
        assert embed.weight.grad is not None
        self.error = float((embed.weight.grad[self.used] - self.sums).norm()) / self.norm

    def check_output(self, name: str, output: Tensor, expected: Tensor) -> None:
        if not torch.equal(output, expected):
            raise AssertionError(f"the output of {name} differs from torch.nn.Embedding's")

    def check_gradient(
        self, name: str, gradient: Tensor, rows: range, columns: range, group: ProcessGroup | None
    ) -> float:
        """Returns a gradient's error against fp64, relative to the norm. Raises if it is more than
        twice torch's.

        :param gradient: the gradient of the block of ``rows`` and ``columns`` of the table.
        :param group: the ranks with the other blocks; ``None`` if the block is the table.
        """
        first, last = torch.searchsorted(self.used, torch.tensor([rows.start, rows.stop])).tolist()
        local = self.used[first:last] - rows.start
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            if not torch.equal(gradient.indices()[0], local):
                raise AssertionError(f"the gradient of {name} has other rows than the ids")
            found = gradient.values()
        else:
            found = gradient[local]
            self._check_unused(name, gradient, local)
        square = (found - self.sums[first:last, columns.start : columns.stop]).square().sum()
        if group is not None:
            dist.all_reduce(square, group=group)
        error = float(square.sqrt()) / self.norm
        if not error <= 2 * self.error + torch.finfo(gradient.dtype).eps:
            raise AssertionError(
                f"the gradient of {name} has an error of {error:.1e}, where torch's has "
                f"{self.error:.1e}"
            )
        return error

    def _check_unused(self, name: str, gradient: Tensor, local: Tensor) -> None:
        unused = torch.ones(len(gradient), dtype=torch.bool).index_fill_(0, local, False)
        for start in range(0, len(gradient), _CHUNK):
            part = slice(start, start + _CHUNK)
            if (gradient[part] != 0).any(1)[unused[part]].any():
                raise AssertionError(f"the gradient of {name} has rows that no id uses")


def block_of(gradient: Tensor, weight: Tensor) -> Tensor:
    """Returns this rank's block of a gradient. DTensor may place it unlike the weight."""
    if isinstance(gradient, DTensor):
        assert isinstance(weight, DTensor)
        return gradient.redistribute(placements=weight.placements).to_local()
    return gradient
