"""The base class of gangs: the processes that share a table, and their collectives.

Every rank in this module is *gang-relative*: 0 to ``size - 1``, independent of global ranks.
Communication volumes are what one rank sends for n bytes of payload, with the ring algorithms of
Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from tp_embed.gang.graph_ops import register

CollectiveHook = Callable[[str, Sequence[Tensor]], AbstractContextManager[object]]

DEFAULT_TIMEOUT = timedelta(minutes=30)


class GangError(RuntimeError):
    """A collective failed, timed out, or is not supported by this gang."""


class ReduceOperation(Enum):
    """How :meth:`Gang.all_reduce` and :meth:`Gang.reduce_scatter` combine the ranks' values."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"


class Gang(ABC):
    """A fixed set of processes, seen from one of them.

    :param rank: the rank of this process in the gang.
    :param size: the number of processes.
    :param device: the device of the tensors that the collectives take.
    :param timeout: how long a collective may wait for the other ranks.
    :raises ValueError: ``size`` is less than 1, or ``rank`` is not in ``[0, size)``.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device | str, timeout: timedelta
    ) -> None:
        if size < 1:
            raise ValueError(f"`size` must be greater than or equal to 1, but is {size} instead.")
        if not 0 <= rank < size:
            raise ValueError(
                f"`rank` must be in [0, {size}) (the size of the gang), but is {rank} instead."
            )
        self._rank = rank
        self._size = size
        self._device = torch.device(device)
        self._timeout = timeout
        self._hooks: OrderedDict[int, CollectiveHook] = OrderedDict()
        self._handle = register(self)

    @property
    def rank(self) -> int:
        """The rank of this process in the gang."""
        return self._rank

    @property
    def size(self) -> int:
        """The number of processes in the gang."""
        return self._size

    @property
    def device(self) -> torch.device:
        """The device of the tensors that the collectives take."""
        return self._device

    @property
    def timeout(self) -> timedelta:
        """How long a collective may wait for the other ranks."""
        return self._timeout

    def create_gang(self, ranks: Sequence[int], *, timeout: timedelta | None = None) -> Gang | None:
        """Creates a gang of some ranks of this one; rank i of it is ``sorted(ranks)[i]`` here.

        Collective: every rank of this gang must call it with the same arguments; no other process
        takes part. Ranks that are not in ``ranks`` get ``None``.

        :param ranks: the ranks, relative to this gang.
        :param timeout: the timeout of the new gang; defaults to the timeout of this gang.
        :raises ValueError: ``ranks`` is empty, holds a rank twice, or one that is not in this gang.
        """
        wrong = [rank for rank in ranks if not 0 <= rank < self._size]
        if not ranks or wrong or len(set(ranks)) != len(ranks):
            raise ValueError(
                f"`ranks` must be distinct ranks of the gang, in [0, {self._size}), and at least "
                f"one, but is {list(ranks)} instead."
            )
        return self._create_gang(sorted(ranks), timeout or self._timeout)

    @abstractmethod
    def _create_gang(self, ranks: list[int], timeout: timedelta) -> Gang | None: ...

    def world(self) -> Gang:
        """Returns a gang of the same kind over all processes of the run. Sends nothing."""
        return self

    @abstractmethod
    def as_process_group(self) -> ProcessGroup:
        """Returns the process group under this gang.

        :raises GangError: the gang has no process group.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Waits until every rank reaches the barrier."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, operation: ReduceOperation = ReduceOperation.SUM) -> None:
        """Reduces ``tensor`` over all ranks, in place.

        Sends 2 (P-1)/P n bytes. The shape and dtype are the same on every rank.
        """

    @abstractmethod
    def all_gather(self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None) -> None:
        """Writes the ``input`` of rank r to ``output[r]``. With ``sizes``, concatenates the inputs
        instead; the ``input`` of rank r has ``sizes[r]`` items along its first dimension.

        Sends (P-1) n bytes. The dtype of ``input``, and without ``sizes`` its shape, are the same
        on every rank. ``input`` may be a view of this rank's part of ``output``.

        :param output: contiguous. *Shape:* :math:`(P,*)`, or :math:`(sum(sizes),*)`.
        :param input: *Shape:* :math:`(*)`, or :math:`(sizes_{rank},*)`.
        :raises ValueError: ``output`` does not have that shape or the dtype of ``input``, or the
            sizes do not fit the tensors or the gang.
        """

    @abstractmethod
    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        operation: ReduceOperation = ReduceOperation.SUM,
    ) -> None:
        """Reduces ``input[rank]`` over all ranks, and writes it to ``output``.

        Sends (P-1)/P n bytes, where n is the size of ``input``.

        :param output: contiguous. *Shape:* :math:`(*)`.
        :param input: *Shape:* :math:`(P,*)`.
        :raises ValueError: ``input`` does not have that shape or the dtype of ``output``.
        """

    @abstractmethod
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
    ) -> None:
        """Sends the r-th piece of ``input`` to rank r; ``output`` receives a piece from each rank,
        in order of rank.

        Sends the pieces of ``input`` for other ranks. The sizes are in items of the first
        dimension, one for each rank; if ``None``, the dimension is split into P equal pieces.

        :param output: contiguous. *Shape:* :math:`(sum(output\\_sizes),*)`.
        :param input: *Shape:* :math:`(sum(input\\_sizes),*)`.
        :raises ValueError: the sizes do not fit the tensors or the gang.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, source_rank: int = 0) -> None:
        """Copies ``tensor`` of ``source_rank`` to all ranks, in place. The source sends between n
        and (P-1) n bytes.

        :raises ValueError: ``source_rank`` is not a rank of this gang.
        """

    @abstractmethod
    def broadcast_objects(self, objects: list[Any], source_rank: int = 0) -> None:
        """Copies the items of ``objects`` of ``source_rank`` to all ranks, in place. They are
        pickled, so use it only between processes that trust each other.

        :raises ValueError: ``source_rank`` is not a rank of this gang.
        """

    def register_collective_hook(self, hook: CollectiveHook) -> RemovableHandle:
        """Runs each collective of this gang in the context ``hook(operation, tensors)``.

        ``operation`` is its name, such as ``"all_gather"``, and ``tensors`` are the inputs of this
        process: for an all-to-all the pieces for other ranks, and no objects. The collectives of a
        :class:`FakeGang` send nothing and run no hook.

        On an accelerator the context exits when the collective is queued, not when it is done.

        :returns: a handle whose ``remove()`` removes the hook.
        """
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    @contextmanager
    def _observed(self, operation: str, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Wraps a collective in a profiler range and all hooks."""
        with ExitStack() as stack:
            stack.enter_context(torch.profiler.record_function(f"tp_embed.{operation}"))
            for hook in tuple(self._hooks.values()):
                stack.enter_context(hook(operation, tensors))
            yield

    def adopt(self, layer: Module) -> None:  # noqa: B027 (most gangs have nothing to mark)
        """Called by every layer that is sharded over this gang once its Parameters exist, and
        again if they are replaced. Gangs of frameworks mark them as the framework expects."""

    def check_model(self, model: Module) -> None:  # noqa: B027
        """Called before the tables of ``model`` are sharded over this gang. Gangs of frameworks
        raise if the framework couldn't train the sharded model."""

    def describe_model(self, model: Module) -> None:  # noqa: B027
        """Called after the tables of ``model`` were sharded over this gang. Gangs of frameworks
        tell the framework about the shards."""

    def whole(self, *parameters: Tensor, modified: bool = False) -> AbstractContextManager[object]:
        """Makes ``parameters`` of an unsharded model available as a whole in this context; a gang
        of a framework that partitions them gathers them. Collective: all ranks of this gang and of
        :meth:`fetched_with` must call it.

        :param modified: whether the caller changes the values, in the same way on every rank.
        """
        return nullcontext()

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Returns the shape of ``parameter`` in :meth:`whole`. Sends nothing."""
        return tuple(parameter.shape)

    def fetched_with(self, model: Module) -> Sequence[Gang]:
        """Returns the gangs that :meth:`whole` gathers the Parameters of ``model`` over; none if
        this rank holds them all."""
        return ()

    @property
    def handle(self) -> int:
        """The id of this gang in graphs of this process; see :mod:`tp_embed.gang.graph_ops`."""
        return self._handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = register(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gang:
        return self  # A copied module uses the same processes.

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(rank={self._rank}, size={self._size}, device='{self._device}')"
        )

    def _check_source_rank(self, source_rank: int) -> None:
        if not 0 <= source_rank < self._size:
            raise ValueError(
                f"`source_rank` must be in [0, {self._size}) (ranks are relative to the gang), "
                f"but is {source_rank} instead."
            )

    def _check_stacked(self, stacked_name: str, stacked: Tensor, name: str, tensor: Tensor) -> None:
        expected = (self._size, *tensor.shape)
        output = stacked if stacked_name == "output" else tensor
        if not output.is_contiguous():
            raise ValueError(
                "`output` must be contiguous, but has the strides "
                f"{output.stride()} for the shape {tuple(output.shape)} instead."
            )
        if stacked.shape != expected or stacked.dtype != tensor.dtype:
            raise ValueError(
                f"`{stacked_name}` must have the shape {expected} and the dtype {tensor.dtype} "
                f"(one `{name}` for each rank), "
                f"but has {tuple(stacked.shape)} and {stacked.dtype} instead."
            )

    def _check_joined(self, output: Tensor, input: Tensor, sizes: Sequence[int]) -> None:
        """Checks the tensors of :meth:`all_gather` with ``sizes``."""
        self._pieces("output", output, sizes)
        expected = (sizes[self._rank], *output.shape[1:])
        if not output.is_contiguous() or input.shape != expected or input.dtype != output.dtype:
            raise ValueError(
                f"`input` must have the shape {expected} and the dtype {output.dtype}, and `output`"
                f" must be contiguous, but they have {tuple(input.shape)}, {input.dtype} and the "
                f"strides {output.stride()} instead."
            )

    def _pieces(self, name: str, tensor: Tensor, sizes: Sequence[int] | None) -> list[int]:
        length = tensor.size(0)
        if sizes is None:
            if length % self._size:
                raise ValueError(
                    f"`{name}` must have a first dimension that is divisible by the size of the "
                    f"gang ({self._size}), but it is {length} instead. Pass `{name}_sizes`."
                )
            return [length // self._size] * self._size
        if len(sizes) != self._size or sum(sizes) != length or min(sizes) < 0:
            raise ValueError(
                f"`{name}_sizes` must be {self._size} sizes (one for each rank) that add up to "
                f"{length}, the first dimension of `{name}`, but is {list(sizes)} instead."
            )
        return list(sizes)
