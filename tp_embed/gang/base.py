"""A gang: the processes that work on the same table, and the collectives between them.

Every rank in this module is *gang-relative*: 0 to ``size - 1``, whatever the global ranks of the
processes are. Communication volumes are what one rank sends, for n bytes of payload, by the ring
algorithms of Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
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
    """A collective failed, timed out, or is not possible on this gang."""


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
        """The gang of some ranks of this one; rank i of it is ``sorted(ranks)[i]`` here.

        Every rank of this gang has to call it with the same arguments; no other process takes
        part. Ranks that are not in ``ranks`` get ``None``.

        :param ranks: the ranks, relative to this gang.
        :param timeout: the timeout of the new gang; if ``None``, that of this gang.
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

    @abstractmethod
    def as_process_group(self) -> ProcessGroup:
        """The process group under this gang.

        :raises GangError: there is none.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Waits until every rank has called it."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, operation: ReduceOperation = ReduceOperation.SUM) -> None:
        """Replaces ``tensor`` by the combination of all ranks' tensors, in place.

        Sends 2 (P-1)/P n bytes. The shape and dtype are the same on every rank.
        """

    @abstractmethod
    def all_gather(self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None) -> None:
        """Writes the ``input`` of rank r to ``output[r]``. With ``sizes``, writes them one after
        the other, the ``input`` of rank r having ``sizes[r]`` items along its first dimension.

        Sends (P-1) n bytes. The dtype of ``input``, and without ``sizes`` its shape, are the same
        on every rank. It may be that part of ``output`` which it is written to.

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
        """Writes the combination of all ranks' ``input[rank]`` to ``output``.

        Sends (P-1)/P n bytes, n being the size of ``input``.

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
        """Sends the r-th piece of ``input`` to rank r; ``output`` gets, by rank, what they sent.

        Sends what ``input`` holds for other ranks. The sizes are in items of the first dimension,
        one for each rank; if ``None``, the dimension is cut into P equal pieces.

        :param output: contiguous. *Shape:* :math:`(sum(output\\_sizes),*)`.
        :param input: *Shape:* :math:`(sum(input\\_sizes),*)`.
        :raises ValueError: the sizes do not fit the tensors or the gang.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, source_rank: int = 0) -> None:
        """Replaces ``tensor`` by that of ``source_rank``, in place. The source sends n bytes at
        least, and (P-1) n at most.

        :raises ValueError: ``source_rank`` is not a rank of this gang.
        """

    @abstractmethod
    def broadcast_objects(self, objects: list[Any], source_rank: int = 0) -> None:
        """Replaces the items of ``objects`` by those of ``source_rank``, in place. They are
        pickled, so use it between processes that trust each other only.

        :raises ValueError: ``source_rank`` is not a rank of this gang.
        """

    def register_collective_hook(self, hook: CollectiveHook) -> RemovableHandle:
        """Has each collective of this gang run in the context of ``hook(operation, tensors)``, with
        its name, such as ``"all_gather"``, and the tensors that this process puts in, of an
        all-to-all the pieces for other ranks; objects are not shown. The collectives of a
        :class:`FakeGang` send nothing, and run no hook.

        On an accelerator the context ends when the collective is queued, not when it is done.

        :returns: a handle whose ``remove()`` takes the hook away.
        """
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    @contextmanager
    def _observed(self, operation: str, tensors: Sequence[Tensor]) -> Iterator[None]:
        """The context that a collective runs in: a range of the profiler, and all hooks."""
        with ExitStack() as stack:
            stack.enter_context(torch.profiler.record_function(f"tp_embed.{operation}"))
            for hook in tuple(self._hooks.values()):
                stack.enter_context(hook(operation, tensors))
            yield

    def adopt(self, layer: Module) -> None:  # noqa: B027 (most gangs have nothing to mark)
        """Called by every layer that is sharded over this gang once its Parameters exist, and
        again if they were replaced. A gang of a framework marks them as the framework expects."""

    def check_model(self, model: Module) -> None:  # noqa: B027
        """Called before the tables of ``model`` are sharded over this gang. A gang of a framework
        raises if the framework could not train it then."""

    def describe_model(self, model: Module) -> None:  # noqa: B027
        """Called when the tables of ``model`` are sharded over this gang. A gang of a framework
        tells the framework what is cut."""

    def whole(self, *parameters: Tensor, modified: bool = False) -> AbstractContextManager[object]:
        """In this context ``parameters``, of a model that is not sharded yet, are there as a whole;
        a gang of a framework that keeps them elsewhere fetches them. All ranks have to call it, and
        those of :meth:`fetched_with`.

        :param modified: whether the caller changes the values, alike on every rank.
        """
        return nullcontext()

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape that ``parameter`` has in :meth:`whole`. Sends nothing."""
        return tuple(parameter.shape)

    def fetched_with(self, model: Module) -> Sequence[Gang]:
        """The gangs with which this rank fetches the Parameters of ``model`` in :meth:`whole`; none
        if they are here."""
        return ()

    @property
    def handle(self) -> int:
        """The number that names this gang in graphs of this process; see
        :mod:`tp_embed.gang.graph_ops`."""
        return self._handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = register(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gang:
        return self  # The processes are not copied with a module that talks to them.

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
        """What :meth:`all_gather` with ``sizes`` asks of its tensors."""
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
