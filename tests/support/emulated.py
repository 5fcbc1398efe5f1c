"""Emulates an accelerator on the CPU, to run code paths that only accelerators take.

``with emulated() as device:`` creates it. Its tensors wrap CPU tensors, so values can be compared.
Inside `no_waiting()`, operations that would wait for CUDA raise. The gradient of an embedding runs
the integer arithmetic of CUDA's kernel, and raises where the kernel would access foreign memory.
The device registers with torch.accelerator, so use it in a separate process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "emulated"
aten = torch.ops.aten

# Operations that read values or sizes from the device. So does a blocking copy to or from the CPU.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}


class WaitedError(RuntimeError):
    """The host waited for the device inside `no_waiting()`."""


class _State:
    """
    :ivar copies: pending copies to the host, which nothing has waited for: (target, source).
    """

    waiting_is_error = False
    capturing = False
    copies: ClassVar[list[tuple[Tensor, Tensor]]] = []


class Event:
    def __init__(self) -> None:
        self._copies = list(_State.copies)

    def synchronize(self) -> None:
        for target, source in self._copies:
            target.copy_(source)
        self._copies.clear()


class Stream:
    """The only stream of the device. Copies to the host complete on waiting for an event."""

    def is_capturing(self) -> bool:
        return _State.capturing

    def record_event(self) -> Event:
        return Event()


def _synchronize(device: object = None) -> None:
    Event().synchronize()
    _State.copies.clear()


@contextmanager
def capturing() -> Iterator[None]:
    """Emulates capturing a graph: waiting is an error."""
    _State.capturing = True
    try:
        with no_waiting():
            yield
    finally:
        _State.capturing = False


def _waits(func: Any) -> None:
    if _State.waiting_is_error:
        raise WaitedError(f"{func} waits for the device.")


@contextmanager
def no_waiting() -> Iterator[None]:
    _State.waiting_is_error = True
    try:
        yield
    finally:
        _State.waiting_is_error = False


class Emulated(Tensor):
    """A tensor on the emulated device, which wraps ``raw``, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Emulated:
        self: Emulated = Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        self.raw = raw
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Emulated({self.raw!r})"

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        _waits("tolist()")
        return self.raw.tolist()

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data).to(self.device, self.dtype)

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(self.new_tensor(index) if isinstance(index, list) else index)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _asks(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Returns whether the host would wait for the device."""
    if func in _WAITS:
        return True
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        # To count true items.
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if func is aten.copy_.default:
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        crosses = isinstance(args[0], Emulated) != isinstance(args[1], Emulated)
        return blocking and crosses and args[1].ndim > 0
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        crosses = isinstance(args[0], Emulated) != (kwargs["device"].type == NAME)
        return crosses and not kwargs.get("non_blocking", False)
    return False


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._pin_memory.default:
        return args[0]
    if _asks(func, args, kwargs):
        _waits(func)
    target = kwargs.get("device")
    to_cpu = target is not None and target.type == "cpu"
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)

    wrapped: dict[int, Tensor] = {}

    def unwrap(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Emulated):
            # Numbers and 0-dim CPU tensors may be mixed with tensors of a device.
            assert not tensor.ndim or func in (aten.copy_.default, aten._to_copy.default), func
            return tensor
        wrapped[id(tensor.raw)] = tensor
        return tensor.raw

    raw_args, raw_kwargs = tree_map_only(Tensor, unwrap, (args, kwargs))
    if func is aten.embedding_dense_backward.default:
        result: Any = embedding_dense_backward(*raw_args)
    else:
        result = func(*raw_args, **raw_kwargs)
    if func is aten.copy_.default and not isinstance(args[0], Emulated):
        if len(args) > 2 and args[2]:  # Without waiting: the values are not there yet.
            _State.copies.append((args[0], args[1].raw.clone()))
            args[0].fill_(-1)
        return args[0]
    if to_cpu:
        return result
    return tree_map_only(Tensor, lambda t: _wrap(t, wrapped.get(id(t))), result)


def _wrap(raw: Tensor, known: Tensor | None) -> Tensor:
    return Emulated(raw) if known is None else known


class _Factories(TorchDispatchMode):
    """Makes tensors on the emulated device, and pinned memory, which is any memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NAME:
            return _run(func, args, {**kwargs, "device": torch.device(NAME)})
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is aten._pin_memory.default:
            return args[0]
        return func(*args, **kwargs)


class _OfLists(TorchFunctionMode):
    """Makes tensors from lists on the CPU and copies them, as torch does outside modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*args, **kwargs)


@contextmanager
def emulated() -> Iterator[str]:
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    # torch's Python backends lack these C++ parts of a backend.
    with (
        patch("torch.accelerator.current_stream", lambda device=None: Stream()),
        patch("torch.accelerator.synchronize", _synchronize),
        _OfLists(),
        _Factories(),
    ):
        yield NAME


def embedding_dense_backward(
    grad: Tensor, rows: Tensor, num_weights: int, padding_idx: int, by_freq: bool
) -> Tensor:
    """Returns the gradient, after the checks of :func:`check_kernel`. Sums up to 3072 rows as CUDA
    does: 32 at a time in fp32, then into the gradient in its dtype."""
    check_kernel(rows, num_weights, grad.size(1))
    result = torch.zeros(num_weights, grad.size(1), dtype=grad.dtype)
    wide = torch.promote_types(grad.dtype, torch.float32)
    step = 32 if len(rows) <= 3072 else len(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        kept = rows[part] != padding_idx
        sums = torch.zeros(num_weights, grad.size(1), dtype=wide)
        sums.index_add_(0, rows[part][kept].long(), grad[part][kept].to(wide))
        result += sums.to(grad.dtype)
    return result


def check_kernel(rows: Tensor, num_weights: int, width: int) -> None:
    """Runs the integer part of CUDA's `embedding_dense_backward` (EmbeddingBackwardKernel.cu),
    whose buffers hold ``max_segments`` entries.

    :raises AssertionError: it would launch an empty grid, or exceed its buffers.
    """
    assert width, "a launch with a grid of 0 blocks"
    if not len(rows):
        return
    low, high = rows.aminmax()
    assert low >= 0, f"rows {low} to {high} of {num_weights}"
    assert high < num_weights, f"rows {low} to {high} of {num_weights}"
    if len(rows) <= 3072:
        return
    max_segments = min(len(rows), num_weights)
    assert -(-max_segments // 32), "a launch with a grid of 0 blocks"
    num_segments = len(rows.unique())
    assert num_segments <= max_segments, f"{num_segments} segments of {max_segments}"
