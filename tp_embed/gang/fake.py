"""A gang without communication, for tests and dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tp_embed.gang.base import DEFAULT_TIMEOUT, Gang, GangError, ReduceOperation


@final
class FakeGang(Gang):
    """A gang of one process that simulates any rank of a gang of any size.

    Its collectives behave as if every rank held the same data as this one: sums multiply by the
    size, and gathers repeat the input, truncated or zero-padded if other ranks would send less or
    more. With ``size=1`` it is a real gang; otherwise use it for dry runs and tests of shapes,
    memory and arithmetic.

    >>> FakeGang("cpu", rank=1, size=4)
    FakeGang(rank=1, size=4, device='cpu')
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        rank: int = 0,
        size: int = 1,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(rank, size, device, timeout)

    def _create_gang(self, ranks: list[int], timeout: timedelta) -> Gang | None:
        if self._rank not in ranks:
            return None
        return FakeGang(
            self._device, rank=ranks.index(self._rank), size=len(ranks), timeout=timeout
        )

    def as_process_group(self) -> ProcessGroup:
        raise GangError(
            f"{self} has no process group. Use a `ProcessGroupGang` where one is needed."
        )

    def barrier(self) -> None:
        pass

    def all_reduce(self, tensor: Tensor, operation: ReduceOperation = ReduceOperation.SUM) -> None:
        if operation is ReduceOperation.SUM:
            tensor.mul_(self._size)

    def all_gather(self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None) -> None:
        if sizes is None:
            self._check_stacked("output", output, "input", input)
            output.copy_(input.expand_as(output))
        else:
            self._check_joined(output, input, sizes)
            self._repeat(output.split(list(sizes)), input)

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        operation: ReduceOperation = ReduceOperation.SUM,
    ) -> None:
        self._check_stacked("input", input, "output", output)
        output.copy_(input[self._rank])
        self.all_reduce(output, operation)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
    ) -> None:
        received = self._pieces("output", output, output_sizes)
        piece = input.split(self._pieces("input", input, input_sizes))[self._rank]
        self._repeat(output.split(received), piece)

    def broadcast(self, tensor: Tensor, source_rank: int = 0) -> None:
        self._check_source_rank(source_rank)

    def broadcast_objects(self, objects: list[Any], source_rank: int = 0) -> None:
        self._check_source_rank(source_rank)

    def _repeat(self, outputs: Sequence[Tensor], input: Tensor) -> None:
        for output in outputs:
            length = min(len(output), len(input))
            output[:length] = input[:length]
            output[length:] = 0
