"""What functions of torch do to the classes of logits, their last dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tp_embed._torch_private import tree_leaves
from tp_embed.nn.indexing import index_of_last

__all__ = ["ELEMENTWISE", "IN_PLACE", "PASSED", "PROPERTIES", "RULES", "Call", "is_partial"]


class Call(NamedTuple):
    """A call of a function of torch with logits, of ``ndim`` dimensions. ``args`` begin with the
    tensor, or the tensors, that the function is a method of, also if given by keyword."""

    name: str
    ndim: int
    num_classes: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# Returns whether the classes stay whole, and the last dimension. Lengths are checked afterwards.
Rule = Callable[[Call], bool]


def _always(call: Call) -> bool:
    return True


def _ints(values: Iterable[Any]) -> list[int]:
    """Returns the numbers in ``values``; none if there is anything else."""
    found = tree_leaves(list(values))
    return found if all(type(value) is int for value in found) else []


def _dims(call: Call, first: int, last: int | None, default: int | None) -> list[int]:
    """Returns the dimensions that arguments from ``first`` to ``last`` name; none for all."""
    given = [*call.args[first:last], *(call.kwargs[key] for key in _DIMS if key in call.kwargs)]
    return _ints(given or [default])


def _along(first: int, last: int | None = 0, default: int | None = None, added: int = 0) -> Rule:
    """Is for functions along dimensions, which must be dimensions of tokens.

    :param last: where the arguments that name dimensions end; by default there is one.
    :param default: the dimension if none is named; ``None`` for all.
    :param added: how many dimensions the result has more. A new one must not follow the classes.
    """
    last = first + 1 if last == 0 else last

    def rule(call: Call) -> bool:
        dims, ndim = _dims(call, first, last, default), call.ndim + added
        return bool(dims) and all(dim % ndim != ndim - 1 for dim in dims)

    return rule


def _permutes(call: Call) -> bool:
    dims = _dims(call, 1, None, None)
    return bool(dims) and dims[-1] % call.ndim == call.ndim - 1


def _pads(call: Call) -> bool:
    pad = call.args[1] if len(call.args) > 1 else call.kwargs["pad"]
    return _ints(pad[:2]) == [0, 0]


def _indexes(call: Call) -> bool:
    target, index, *values = call.args
    if values and isinstance(index, Tensor) and index.shape == target.shape:
        return index.dtype == torch.bool and not isinstance(values[0], Tensor)
    return _is_whole(index_of_last(index, target.ndim))


def _is_whole(part: object) -> bool:
    # Not one with the number of classes, which differs between ranks.
    return isinstance(part, slice) and part == slice(None)


def _chooses(call: Call) -> bool:
    return len(call.args) == 3 or "other" in call.kwargs  # Else it looks for indices.


def is_partial(call: Call) -> bool:
    """Returns whether ``call``, of the classes, is half of what losses and checks of values do that
    then reduce over ranks. With ``keepdim`` the result would go back into the logits, as in a
    softmax."""
    keepdim = call.args[2] if len(call.args) > 2 else call.kwargs.get("keepdim")
    return call.name in _PARTIAL and not keepdim


_DIMS = ("dim", "dims", "axis", "axes", "dim0", "dim1", "axis0", "axis1", "source", "destination")
_PARTIAL = ("all", "amax", "amin", "any", "sum")

# With tensors of the classes. Other properties are facts about the tensor.
PROPERTIES = frozenset({"H", "T", "data", "grad", "imag", "mH", "mT", "real"})

_FACTS = """
    __delete__ __dir__ __format__ __get__ __hash__ __len__ __reduce_ex__ __repr__ __set__ __str__
    _is_view backward dim element_size get_device grad has_names is_complex is_conj is_contiguous
    is_floating_point is_inference is_neg is_pinned is_same_size is_shared is_signed ndimension
    nelement new_empty new_full new_ones new_tensor new_zeros numel record_stream register_hook
    register_post_accumulate_grad_hook requires_grad_ retain_grad size storage_offset stride
    untyped_storage
"""
# Results stay as they are: facts about the tensor, gradients of others, and new tensors.
PASSED = frozenset(_FACTS.split())

_ARITHMETIC = """
    abs absolute add addcdiv addcmul clamp clamp_max clamp_min clip div divide erf exp exp2 expm1
    fill floor_divide lerp log log10 log1p log2 masked_fill maximum minimum mul multiply nan_to_num
    neg negative pow reciprocal relu remainder round rsqrt sigmoid sign softplus sqrt square sub
    subtract tanh true_divide
"""
_OPERATORS = "add and floordiv mod mul or pow rdiv rmul rpow rsub sub truediv xor"
_OTHERS = """
    .data .grad .real __abs__ __eq__ __ge__ __gt__ __invert__ __le__ __lt__ __ne__ __neg__ __pos__
    bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool clone contiguous cpu cuda detach
    double empty_like eq float full_like ge gt half int isclose isfinite isinf isnan le logical_and
    logical_not logical_or logical_xor logsigmoid long lt ne ones_like positive rand_like
    randn_like rsub softsign to type type_as where zeros_like
"""
IN_PLACE = frozenset(
    [
        *(f"{name}_" for name in _ARITHMETIC.split()),
        *(f"__i{name}__" for name in _OPERATORS.split()),
        *("copy_", "detach_", "zero_"),
    ]
)
# Each result depends on one class only. Any operand may be the logits.
ELEMENTWISE = frozenset(
    [
        *IN_PLACE,
        *_ARITHMETIC.split(),
        *(f"__{name}__" for name in _OPERATORS.split()),
        *_OTHERS.split(),
    ]
)
# If the last dimension is as long as before, it holds the classes: views are in order of memory.
_RESHAPING = """
    broadcast_to expand expand_as flatten repeat reshape reshape_as tile unflatten view view_as
"""
_REDUCING = """
    all amax amin any cummax cummin cumprod cumsum max mean min prod std sum var
"""
RULES: dict[str, Rule] = {
    **dict.fromkeys([*ELEMENTWISE, *_RESHAPING.split()], _always),
    **dict.fromkeys(_REDUCING.split(), _along(1)),
    "__getitem__": _indexes,
    "__setitem__": _indexes,
    "cat": _along(1, default=0),
    "chunk": _along(2, default=0),
    "concat": _along(1, default=0),
    "concatenate": _along(1, default=0),
    "flip": _along(1, None),
    "gather": _along(1),
    "index_select": _along(1),
    "movedim": _along(1, 3),
    "moveaxis": _along(1, 3),
    "narrow": _along(1),
    "pad": _pads,
    "pad_sequence": lambda call: call.ndim > 1,
    "permute": _permutes,
    "repeat_interleave": _along(2),
    "roll": _along(2),
    "select": _along(1),
    "split": _along(2, default=0),
    "split_with_sizes": _along(2, default=0),
    "squeeze": _along(1, None),
    "stack": _along(1, default=0, added=1),
    "swapaxes": _along(1, 3),
    "swapdims": _along(1, 3),
    "tensor_split": _along(2, default=0),
    "transpose": _along(1, 3),
    "unbind": _along(1, default=0),
    "unsqueeze": _along(1, added=1),
    "where": _chooses,
}
