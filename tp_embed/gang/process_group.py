"""A gang over a process group of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, final
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tp_embed._torch_private import find_backend, new_group, resolve_process_group
from tp_embed.gang import Gang, GangError, ReduceOperation

# Below this size, gloo's own all-gather is as fast as `_gather()` in several rounds.
_SMALL_BYTES = 1 << 16


class ProcessGroupGang(Gang):
    """A gang over a process group of :mod:`torch.distributed`.

    :param process_group: the group; if ``None``, the default group of all processes.
    :param device: the device of the tensors that the collectives take. The group needs a backend
        for it: gloo for ``cpu``, NCCL for ``cuda``.
    :raises GangError: torch.distributed is not initialised.
    :raises ValueError: this process is not in the group, or the group has no backend for ``device``
        that communicates.

    The gang has the timeout of the group. On gloo, a collective is done when it returns, and
    failures raise :class:`GangError`. On NCCL, collectives run in the background; NCCL's watchdog
    notices missing ranks and ends the process with its own message.

    A gang can be pickled, for example in a module, and finds its group again when unpickled. A
    process outside the group gets a gang of the same rank and size whose collectives raise
    :class:`GangError`.
    """

    def __init__(self, process_group: ProcessGroup | None, device: torch.device | str) -> None:
        if not dist.is_initialized():
            raise GangError(
                "torch.distributed must be initialised before a `ProcessGroupGang` is made. Call "
                "`torch.distributed.init_process_group()` or `deepspeed.init_distributed()`."
            )
        group = process_group if process_group is not None else dist.group.WORLD
        # A process outside the group gets a placeholder from torch.
        if not isinstance(group, ProcessGroup):
            raise ValueError(
                f"`process_group` must include this process (global rank {dist.get_rank()}), but "
                "does not. Make a gang only in the processes of the group."
            )
        device = torch.device(device)
        try:
            backend, timeout = find_backend(group, device)
        except RuntimeError as e:
            raise ValueError(
                f"`device` must have a backend in `process_group`, but is '{device}' instead. Pass "
                "the device of the group, or give the group a backend for it."
            ) from e
        if backend == "fake" or timeout is None:
            raise ValueError(
                "`process_group` must have a backend that communicates, but has torch's 'fake' "
                "backend instead, whose ranks can't have different sizes. Use a `FakeGang(device, "
                "rank=..., size=...)` for dry runs."
            )
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device, timeout)
        self._group = group
        self._is_gloo = "gloo" in backend

    @property
    def global_ranks(self) -> list[int]:
        """The global rank of each rank of the gang."""
        return dist.get_process_group_ranks(self._group)

    def _create_gang(self, ranks: list[int], timeout: timedelta) -> Gang | None:
        name = [uuid4().hex]
        self.broadcast_objects(name)
        if self._rank not in ranks:
            return None
        group = new_group(
            name[0],
            [self.global_ranks[rank] for rank in ranks],
            dist.get_backend(self._group),
            timeout,
        )
        return type(self)(group, self._device)

    def world(self) -> Gang:
        return type(self)(None, self._device)

    def as_process_group(self) -> ProcessGroup:
        return self._group

    def barrier(self) -> None:
        self._run("barrier", lambda: dist.barrier(self._group))

    def all_reduce(self, tensor: Tensor, operation: ReduceOperation = ReduceOperation.SUM) -> None:
        op = getattr(dist.ReduceOp, operation.name)
        with _contiguous(tensor) as own:
            self._run("all_reduce", lambda: dist.all_reduce(own, op, self._group), own)

    def all_gather(self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None) -> None:
        if sizes is None:
            self._check_stacked("output", output, "input", input)
            numels = [input.numel()] * self._size
        else:
            self._check_joined(output, input, sizes)
            numels = [size * output[:1].numel() for size in sizes]
        flat, source = output.view(-1), input.contiguous().view(-1)
        self._run("all_gather", lambda: self._gather(flat, source, numels), input)

    def _gather(self, output: Tensor, input: Tensor, sizes: list[int]) -> None:
        """Concatenates the inputs of all ranks, with ``sizes`` items each."""
        is_even = len(set(sizes)) == 1
        if is_even and (not self._is_gloo or input.nbytes < _SMALL_BYTES):
            dist.all_gather_single(output, input, self._group)
            return
        outputs = output.split(sizes)
        if not self._is_gloo:
            dist.all_gather(list(outputs), input, self._group)
            return
        # gloo's own all-gather copies everything once more, and takes two to three times as long as
        # P-1 rounds: in round i each rank sends to the i-th rank after it, without copies.
        rounds = []
        for step in range(1, self._size):
            to, source = (self._rank + step) % self._size, (self._rank - step) % self._size
            sent, received = [0] * self._size, [0] * self._size
            sent[to], received[source] = sizes[self._rank], sizes[source]
            rounds.append(
                dist.all_to_all_single(
                    outputs[source], input, received, sent, self._group, async_op=True
                )
            )
        if outputs[self._rank].data_ptr() != input.data_ptr():
            outputs[self._rank].copy_(input)
        for work in rounds:
            work.wait()

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        operation: ReduceOperation = ReduceOperation.SUM,
    ) -> None:
        self._check_stacked("input", input, "output", output)
        op = getattr(dist.ReduceOp, operation.name)
        flat = output.view(-1)
        source = input.contiguous().view(-1)
        self._run(
            "reduce_scatter",
            lambda: dist.reduce_scatter_single(flat, source, op, self._group),
            input,
        )

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
    ) -> None:
        received = self._pieces("output", output, output_sizes)
        sent = self._pieces("input", input, input_sizes)
        source = input.contiguous()
        pieces = source.split(sent)
        self._run(
            "all_to_all",
            lambda: dist.all_to_all_single(output, source, received, sent, self._group),
            *pieces[: self._rank],
            *pieces[self._rank + 1 :],
        )

    def broadcast(self, tensor: Tensor, source_rank: int = 0) -> None:
        self._check_source_rank(source_rank)
        with _contiguous(tensor) as own:
            self._run(
                "broadcast",
                lambda: dist.broadcast(own, group=self._group, group_src=source_rank),
                own,
            )

    def broadcast_objects(self, objects: list[Any], source_rank: int = 0) -> None:
        self._check_source_rank(source_rank)
        self._run(
            "broadcast_objects",
            lambda: dist.broadcast_object_list(
                objects, group=self._group, device=self._device, group_src=source_rank
            ),
        )

    def _run(self, operation: str, collective: Callable[[], object], *tensors: Tensor) -> None:
        """Runs a collective that sends ``tensors``; all collectives of the gang go through here."""
        try:
            with self._observed(operation, tensors):
                collective()
        except RuntimeError as e:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors) or "no tensor"
            raise GangError(
                f"`{operation}` of {shapes} failed on rank {self._rank} of {self} (timeout "
                f"{self._timeout}): {e}\nEvery rank of the gang has to call the same collectives "
                "with the same shapes; look for a rank that stopped, took another branch, "
                "or was given other ids, which TP_EMBED_CHECK_IDS=1 compares at each lookup. "
                'One rank alone may look up with `output="shard"` and `check_ids=False`.'
            ) from e

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, global_ranks={self.global_ranks})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_gang, (
            type(self),
            self._group.group_name,
            self.global_ranks,
            self._rank,
            self._device,
        )


@contextmanager
def _contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """Yields ``tensor``, or a contiguous copy that is copied back: gloo would change the first
    items of its memory."""
    own = tensor.contiguous()
    yield own
    if own is not tensor:
        tensor.copy_(own)


def _restore_gang(
    kls: type[ProcessGroupGang],
    group_name: str,
    global_ranks: list[int],
    rank: int,
    device: torch.device,
) -> Gang:
    if dist.is_initialized():
        try:
            group = resolve_process_group(group_name)
        except LookupError:
            group = None
        if (
            group is not None
            and dist.get_process_group_ranks(group) == global_ranks
            and dist.get_rank(group) == rank
        ):
            return kls(group, device)
    return _DetachedGang(rank, global_ranks, device)


@final
class _DetachedGang(Gang):
    """An unpickled gang outside its process group: knows its rank and size, but can't send."""

    def __init__(self, rank: int, global_ranks: list[int], device: torch.device) -> None:
        super().__init__(rank, len(global_ranks), device, timedelta(0))
        self._global_ranks = global_ranks

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise GangError(
            f"{self} was unpickled in a process that is not rank {self._rank} of a process group "
            f"of the global ranks {self._global_ranks}, so it can't communicate. Assign a gang of "
            "this process to the `gang` of the layer."
        )

    _create_gang = as_process_group = barrier = all_reduce = all_gather = _refuse
    reduce_scatter = all_to_all = broadcast = broadcast_objects = _refuse
