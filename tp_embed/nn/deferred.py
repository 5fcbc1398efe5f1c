"""Logits that are not computed until a loss asks for them, a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from inspect import signature
from numbers import Real
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Module

from tp_embed._torch_private import version
from tp_embed.nn.indexing import index_of_last
from tp_embed.nn.late_calls import Modes, only_engine_hooks

__all__ = ["DeferredLogits", "DeferredLogitsError"]

_SUPPORTED = (
    "Deferred logits can be multiplied and divided by numbers, capped by one `tanh`, have a bias "
    "added, be cast to another floating dtype, and be sliced and reshaped along their tokens, and "
    "`torch.nn.functional.cross_entropy` takes them with the shape (tokens, classes)."
)
_FIX = (
    "For logits, leave out the labels or call `model.eval()`, or turn off `fuse_loss`: "
    "`head.output = 'replicated'`. With `fuse_loss='always'` evaluation has none either: pass True."
)


class DeferredLogitsError(AttributeError, TypeError):
    """Something needs logits that were not computed.

    An ``AttributeError``, so that ``hasattr(logits, name)`` is false for what they don't have.
    """


class _Head(Protocol):
    """What deferred logits need of an :class:`~tp_embed.OutputHead`."""

    weight: Any
    out_features: int
    soft_cap: float | None
    bias: Any

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor: ...

    def __call__(self, x: Tensor, *, compute: Callable[[Tensor], Tensor]) -> Any: ...


class _Values(NamedTuple):
    """What was done to the logits of the head, :math:`l`: they are :math:`s (l + b)` if ``outer``
    is ``None``, or else ``outer`` :math:`\\tanh(s (l + b))`.

    Exact numbers, so that dividing by a cap and multiplying by it again leaves no rounding.
    """

    scale: Fraction = Fraction(1)
    bias: Tensor | None = None
    outer: Fraction | None = None

    def options(self, head: _Head) -> dict[str, Any]:
        """Returns options of :meth:`tp_embed.OutputHead.loss`."""
        bias = head.bias
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        if self.outer is None:
            return {"bias": bias, "scale": float(self.scale), "soft_cap": None}
        # The loss caps by c tanh(scale l / c).
        scale, cap = float(self.scale * self.outer), float(abs(self.outer))
        return {"bias": bias, "scale": scale, "soft_cap": cap}


class _Kind(type):
    """Other libraries print the types of objects that they don't support: this adds the fix."""

    def __repr__(cls) -> str:
        return f"{super().__repr__()}: logits that were not computed. {_FIX}"


class DeferredLogits(metaclass=_Kind):
    """The logits of an :class:`~tp_embed.OutputHead` with ``output="deferred"``: hidden states, and
    what was done to the logits since. ``torch.nn.functional.cross_entropy`` of them is
    :meth:`tp_embed.OutputHead.loss`, which never holds all logits; it returns fp32.

    Not a tensor, so that nothing can read values that don't exist. Between head and loss a model
    may do what models do: multiply and divide by numbers, add a bias, *Shape:* :math:`(V)`, cap by
    :math:`c \\tanh(l / c)`, cast to floating dtypes, and slice and reshape the dimensions of
    tokens. These leave no rounding: the loss computes with fp32 numbers. Anything else raises.

    :raises DeferredLogitsError: something needs the values; the message says how to get them.
    """

    def __init__(self, head: _Head, x: Tensor, dtype: torch.dtype | None = None) -> None:
        """
        :param x: the hidden states. *Shape:* :math:`(*,E)`.
        :param dtype: the dtype of the logits if they were computed; defaults to the dtype of ``x``.
        """
        self._head, self._x = head, x
        # In a tuple, where ZeRO 3 does not find it: else it would gather it for the whole model.
        self._weight = head.weight, _changes_of(head.weight), head.weight.requires_grad
        self._modes = Modes.of(x)
        self._changes = _changes_of(x)
        # An optimizer's step may follow a backward; DeepSpeed's leaves no version.
        self._was_backward: list[bool] = []
        if x.requires_grad and torch.is_grad_enabled():
            x.register_hook(_noting(self._was_backward))
        self.dtype = x.dtype if dtype is None else dtype
        self._applied = _Values()
        if head.soft_cap is not None:
            cap = Fraction(head.soft_cap)
            self._applied = _Values(scale=1 / cap, outer=cap)

    def _like(self, x: Tensor | None = None, **values: Any) -> DeferredLogits:
        self._check_unchanged()
        new = object.__new__(DeferredLogits)
        new._head, new._weight, new.dtype = self._head, self._weight, self.dtype
        new._modes = self._modes
        new._was_backward = self._was_backward
        new._x = self._x if x is None else x
        new._changes = _changes_of(new._x)
        new._applied = self._applied._replace(**values)
        return new

    def _check_unchanged(self) -> None:
        if self._was_backward or _changes_of(self._x) != self._changes:
            _refuse_late()

    def _loss(self, target: Tensor, options: dict[str, Any]) -> Tensor:
        """Computes :meth:`tp_embed.OutputHead.loss` in a call of the head, around which engines
        gather its weight."""
        head = self._head

        def compute(x: Tensor) -> Tensor:
            weight, version, is_trained = self._weight
            is_same = head.weight is weight and _changes_of(weight) == version
            if not is_same or weight.requires_grad != is_trained:
                _refuse_late()
            return head.loss(x, target, **options, **self._applied.options(head))

        self._check_unchanged()
        with self._modes.restored(), only_engine_hooks(cast(Module, head)):
            loss: Tensor = head(self._x, compute=compute)
        return loss

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._x.shape[:-1], self._head.out_features))

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def ndim(self) -> int:
        return self._x.ndim

    @property
    def requires_grad(self) -> bool:
        return self._x.requires_grad

    def dim(self) -> int:
        return self._x.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __mul__(self, factor: object) -> DeferredLogits:
        number, values = _number(factor, "mul"), self._applied
        if values.outer is not None:
            return self._like(outer=values.outer * number)
        return self._like(scale=values.scale * number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> DeferredLogits:
        return self * (1 / _number(divisor, "div"))

    def __neg__(self) -> DeferredLogits:
        return self * -1

    def __add__(self, bias: object) -> DeferredLogits:
        values, num_classes = self._applied, self._head.out_features
        is_bias = (
            isinstance(bias, Tensor)
            and bias.ndim <= self.ndim
            and bias.shape[-1:] == (num_classes,)
            and bias.numel() == num_classes
        )
        if not is_bias or values.outer is not None:
            _refuse("add")
        added = cast(Tensor, bias).view(num_classes)
        if values.scale != 1:
            added = added / float(values.scale)
        return self._like(bias=added if values.bias is None else values.bias + added)

    __radd__ = __add__

    def tanh(self) -> DeferredLogits:
        if self._applied.outer is not None:
            _refuse("tanh")
        return self._like(outer=Fraction(1))

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        # Of a tensor that holds nothing; `copy` and `non_blocking` change no values.
        probe = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if not probe.is_floating_point() or probe.device != self.device:
            _refuse("to")
        new = self._like()
        new.dtype = probe.dtype
        return new

    type = to

    def type_as(self, other: Tensor) -> DeferredLogits:
        return self.to(other.dtype)

    def float(self) -> DeferredLogits:
        return self.to(torch.float32)

    def double(self) -> DeferredLogits:
        return self.to(torch.float64)

    def contiguous(self) -> DeferredLogits:
        return self

    def view(self, *shape: Any) -> DeferredLogits:
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            _refuse("view")
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        # Fails as it would for the logits, and finds a size of -1.
        found = torch.empty(self.shape, device="meta").view(sizes).shape
        if found[-1:] != self.shape[-1:]:
            _refuse("view")
        return self._like(self._x.reshape(*found[:-1], self._x.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> DeferredLogits:
        return self.view(torch.empty(self.shape, device="meta").flatten(start_dim, end_dim).shape)

    def transpose(self, dim0: int, dim1: int) -> DeferredLogits:
        if self.ndim - 1 in (dim0 % self.ndim, dim1 % self.ndim):
            _refuse("transpose")
        return self._like(self._x.transpose(dim0, dim1))

    def __getitem__(self, index: Any) -> DeferredLogits:
        last, num_classes = index_of_last(index, self.ndim), self.shape[-1]
        if not isinstance(last, slice) or last.indices(num_classes) != (0, num_classes, 1):
            _refuse("indexing of classes")
        *parts, end = index if isinstance(index, tuple) else (index,)
        return self._like(self._x[(*parts, slice(None) if end is last else end)])

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.cross_entropy:
            return _cross_entropy(*args, **(kwargs or {}))
        name = str(getattr(func, "__name__", func))
        if name in _COMMUTATIVE and args and not isinstance(args[0], cls):
            args = args[::-1]
        method = _FUNCTIONS.get(name)
        if method is None or not args or not isinstance(args[0], cls):
            _refuse(name)
        try:
            given = signature(method).bind(*args, **(kwargs or {}))
        except TypeError:
            _refuse(f"{name} with {', '.join(kwargs)}")
        return method(*given.args, **given.kwargs)


_COMMUTATIVE = frozenset({"add", "mul"})
# By the names of functions in `torch`.
_FUNCTIONS: dict[str, Callable[..., DeferredLogits]] = {
    "add": DeferredLogits.__add__,
    "mul": DeferredLogits.__mul__,
    "multiply": DeferredLogits.__mul__,
    "div": DeferredLogits.__truediv__,
    "divide": DeferredLogits.__truediv__,
    "true_divide": DeferredLogits.__truediv__,
    "neg": DeferredLogits.__neg__,
    "tanh": DeferredLogits.tanh,
    "reshape": DeferredLogits.view,
    "flatten": DeferredLogits.flatten,
    "transpose": DeferredLogits.transpose,
}


def _make_refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: DeferredLogits, *args: object) -> NoReturn:
        _refuse(name)

    return refuse


# Python looks up operators on the class. The default `==` would compare identities.
for _name in (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__float__"),
    *("__int__", "__array__", "__reduce_ex__", "__setitem__", "__contains__", "__abs__"),
    *("__sub__", "__rsub__", "__rtruediv__", "__matmul__", "__rmatmul__", "__pow__", "__rpow__"),
    *("__floordiv__", "__mod__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
):
    setattr(DeferredLogits, _name, _make_refusal(_name))


def _refuse(name: str) -> NoReturn:
    raise DeferredLogitsError(
        f"`{name}` needs the values of logits, which were not computed: `cross_entropy` takes them "
        f"a chunk of tokens at a time, from hidden states. {_SUPPORTED} {_FIX}"
    )


def _refuse_late() -> NoReturn:
    raise DeferredLogitsError(
        "Deferred logits must be used before `backward()`, and before their hidden states or the "
        "weight of their head change, or the weight is frozen or no longer frozen, but are used "
        f"after that. {_FIX}"
    )


def _noting(events: list[bool]) -> Callable[[Tensor], None]:
    def note(grad: Tensor) -> None:
        events.append(True)

    return note


def _changes_of(tensor: Tensor) -> int:
    """Returns a count of changes in place; tensors of inference mode have none."""
    return 0 if tensor.is_inference() else version(tensor)


def _number(value: object, name: str) -> Fraction:
    """Returns a finite number other than 0, exactly."""
    if isinstance(value, Fraction):
        return value
    if not isinstance(value, Real) or not math.isfinite(value) or value == 0:
        _refuse(f"{name} by {type(value).__name__}")
    return Fraction(float(value))


def _cross_entropy(
    logits: object,
    target: object,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes :func:`torch.nn.functional.cross_entropy` by :meth:`tp_embed.OutputHead.loss`."""
    for name, value in {"size_average": size_average, "reduce": reduce}.items():
        if value is not None:
            _refuse(f"cross_entropy({name}=...)")
    if not isinstance(logits, DeferredLogits) or not isinstance(target, Tensor):
        _refuse("cross_entropy of a target with gradients")
    if target.shape == logits.shape:
        _refuse("cross_entropy of probabilities of classes")
    if logits.ndim > 2:
        _refuse("cross_entropy of classes in the second dimension")
    options = {
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    return logits._loss(target, options)
