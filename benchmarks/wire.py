"""Counts the bytes that collectives of torch.distributed send, whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes that one of P ranks sends for n bytes of input, with the ring algorithms of Patarasuk and
# Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
_SHARES: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda size: 2 * (size - 1) / size,
    "all_gather": lambda size: size - 1,
    "reduce_scatter": lambda size: (size - 1) / size,
    "all_to_all": lambda size: (size - 1) / size,
}

# Operators of torch.distributed and DTensor -> their collective, and the index of the argument with
# this rank's input.
_OPERATORS = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 1),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
}
_UNCOUNTED = ("barrier", "wait_tensor", "_wrap_tensor_autograd")  # Negligible.


class Wire(TorchDispatchMode):
    """Sums the bytes that this rank of ``group`` sends in this context, in ``bytes_sent``.

    :raises NotImplementedError: an unknown collective is called.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.bytes_sent = 0.0
        self._size, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if name in _OPERATORS:
            operation, position = _OPERATORS[name]
            tensors = [t for t in tree_leaves(args[position]) if isinstance(t, Tensor)]
            self.bytes_sent += self._sent(operation, name, tensors, args)
        elif name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(_UNCOUNTED):
            raise NotImplementedError(f"{name} is not counted; add it to `_OPERATORS`.")
        return func(*args, **(kwargs or {}))

    def _sent(
        self, operation: str, name: str, tensors: Sequence[Tensor], args: Sequence[Any]
    ) -> float:
        nbytes: int = sum(tensor.nbytes for tensor in tensors)
        if operation == "all_to_all":
            # c10d: output, input, group, output sizes, input sizes; else input, output sizes, ...
            sizes: list[int] = args[4] if name.startswith("c10d") else args[2]
            if sizes and sum(sizes):
                return nbytes * (1 - sizes[self._rank] / sum(sizes))
        return nbytes * _SHARES[operation](self._size)


def bytes_sent(group: dist.ProcessGroup, work: Callable[[], object]) -> int:
    """Returns the bytes that this rank sends while ``work`` runs."""
    wire = Wire(group)
    with wire:
        work()
    return round(wire.bytes_sent)


def most_over(group: dist.ProcessGroup, value: float) -> float:
    """Returns the largest ``value`` over the ranks of ``group``."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return float(tensor)
