"""The weight of a sharded table: a Parameter that refuses to be used as the whole table.

To other code the weight of a sharded layer looks like a Parameter of a smaller shape. Multiplying
by it, or indexing a row, would silently give a partial result. So the weight knows its gang and its
place in the table, and raises if it is used as a table. Elementwise operations are allowed:
optimizers, copies, casts, flat buffers.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from tp_embed._torch_private import (
    DisableTorchFunctionSubclass,
    OperatorBase,
    never_compile,
    rebuild_parameter,
    rebuild_parameter_with_state,
    support_foreach,
    tree_leaves,
)
from tp_embed.gang import Gang
from tp_embed.gang.collectives import whole_table
from tp_embed.parameter.operations import (
    FLAT,
    FOREACH_REDUCTIONS,
    IN_PLACE,
    KEPT,
    OF_GRAPHS,
    PASSED,
    PIECES,
    SPARSE,
    TRANSPOSED,
    VALUES,
    VECTOR,
)
from tp_embed.parameter.reductions import OF_GRADIENTS, REDUCTIONS, reduce_table
from tp_embed.partition import Partition, describe


@dataclass(frozen=True)
class Shard:
    """Describes the table of a shard: sharded along ``dim`` over ``gang``, with its name in the
    model, if known. ``is_vector`` marks a shard concatenated with other Parameters."""

    gang: Gang
    partition: Partition
    dim: int
    name: str | None = None
    is_vector: bool = False

    @property
    def table(self) -> str:
        own = self.partition.shard(self.gang.rank)
        axis = "columns" if self.dim else "rows"
        return f"{axis} {describe(own)} of {self.partition.size}, on {self.gang}"


def unguarded() -> AbstractContextManager[object]:
    """Treats shards as plain tensors in this context, for code that expects a shard."""
    context: AbstractContextManager[object] = DisableTorchFunctionSubclass()
    return context


def local(tensor: Tensor) -> Tensor:
    """Returns ``tensor.detach()`` as a plain tensor that shares its memory."""
    with unguarded():
        return tensor.detach()


def mark_shard(weight: Tensor, gang: Gang, partition: Partition, dim: int) -> None:
    """Turns ``weight``, this rank's shard, into a :class:`ShardedParameter` in place, so that
    references stay valid. Over a gang of one rank it stays a Parameter: it is the whole table."""
    if gang.size > 1 and isinstance(weight, Parameter):
        if type(weight) in (Parameter, ShardedTensor):  # `.to(device)` returns either.
            weight.__class__ = ShardedParameter
        if isinstance(weight, ShardedParameter):
            name = weight._shard.name if hasattr(weight, "_shard") else None
            weight._shard = Shard(gang, partition, dim, name)


def check_block(weight: Tensor, gang: Gang, partition: Partition, dim: int) -> None:
    """Checks ``weight`` before a layer computes with it, since users may assign to it.

    :raises ValueError: ``weight`` does not have the size of this rank's block.
    """
    own = partition.shard(gang.rank)
    if gang.size > 1 and weight.size(dim) != len(own):
        cut = f"{':, ' if dim else ''}{describe(own)}"
        raise ValueError(
            f"The weight of a sharded table must be this rank's shard, "
            f"{Shard(gang, partition, dim).table}, but has the shape {tuple(weight.shape)} "
            f"instead. Assign the shard: `weight.data = table[{cut}]`. Or make the layer of a "
            "whole table: `from_tensor()`, `from_embedding()`, `shard_embeddings()`."
        )


def name_shard(weight: Tensor, name: str) -> None:
    """Names the table of ``weight``, if it is a shard, for errors."""
    if isinstance(weight, ShardedParameter):
        weight._shard = replace(weight._shard, name=name)


def as_shard(tensor: Tensor | None, weight: Tensor) -> Tensor | None:
    """Returns ``tensor``, which has a value for each item of ``weight``, as a shard of the same
    table; keeps ``None``."""
    if tensor is None or not isinstance(weight, ShardedParameter):
        return tensor
    shard = tensor.as_subclass(ShardedTensor)
    shard._shard = weight._shard
    return shard


class _Guarded:
    """Refuses operations that would treat a shard as the whole table."""

    _shard: Shard

    @property
    def gang(self) -> Gang:
        """The gang that the table is sharded over."""
        return self._shard.gang

    @property
    def shard_dim(self) -> int:
        """The sharded dimension: 0 for rows, 1 for columns."""
        return self._shard.dim

    def to_local(self: Any) -> Tensor:
        """Returns this rank's shard as a plain tensor, which shares its memory and gradient.

        :returns: *Shape:* :math:`(V_{rank},E)` or :math:`(V,E_{rank})`.
        """
        with unguarded():
            return self.detach() if self.is_sparse else self.view_as(self)  # type: ignore[no-any-return]

    def full_tensor(self: Any, device: torch.device | str | None = None) -> Tensor:
        """Returns the whole table, without its gradient. Collective: all ranks of the gang must
        call it. Sends (P-1) times the largest shard, in chunks of 16 MiB.

        :param device: the device of the table; if ``None``, the device of the shard.
        :returns: *Shape:* :math:`(V,E)`.
        """
        shard, own = self._shard, local(self)
        if 0 in shard.partition.sizes:
            # DeepSpeed returns gradients of empty shards in other dtypes. The first rank has items.
            dtype: list[Any] = [own.dtype]
            shard.gang.broadcast_objects(dtype)
            own = own if own.numel() else own.to(dtype[0])
        cut = shard.dim, shard.gang, shard.partition, device
        if own.ndim > 2:  # Batched gradients (`is_grads_batched=True`).
            return torch.stack([whole_table(block, *cut) for block in own])
        return whole_table(own, *cut)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OperatorBase):
            operator: Any = func
            if operator.namespace not in OF_GRAPHS and _needs_graph(args, kwargs):
                raise ValueError(_refusal(operator.__name__, args, kwargs))
            with unguarded():
                return func(*args, **kwargs)
        name = func.__name__
        if name in REDUCTIONS:
            reduced = reduce_table(name, args, kwargs)
            if reduced is not NotImplemented:
                return reduced
        if name in ("__get__", "__set__", "__delete__"):
            name = func.__self__.__name__
            is_passed, is_kept = name not in TRANSPOSED, name == "data"
            is_kept = is_kept and func.__name__ == "__get__"
        else:
            is_kept = name in KEPT or name in FLAT or name in VALUES or name in VECTOR
            is_passed = (is_kept and name not in VECTOR) or _passes(func, name, args, kwargs)
        if getattr(func, "__module__", None) == dist.distributed_c10d.__name__:
            is_passed = not _reaches_gang(func, args, kwargs)
        if name == "register_hook":
            args, kwargs = _with_marked_gradient(*args, **kwargs), {}
        with unguarded():
            if not is_passed:
                # Not a TypeError: torch's operators would turn it into `NotImplemented`.
                raise ValueError(_refusal(name, args, kwargs))
            try:
                result = func(*args, **kwargs)
            except RuntimeError as e:
                if name in KEPT or name in IN_PLACE:  # An operand may have the table's shape.
                    raise ValueError(_refusal(name, args, kwargs)) from e
                raise
        if name == "grad":
            _mark_grads(func, args, result)
        is_kept = is_kept or (name in IN_PLACE and isinstance(result, Tensor))
        return _kept(result, name, args, kwargs) if is_kept else result


def _passes(func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> bool:
    if name in PASSED or name in IN_PLACE or name in SPARSE:
        return True
    if name in PIECES or name in VECTOR:
        origin = _origin(args, kwargs)
        return origin.ndim == 1 and not isinstance(origin, ShardedGrad)
    if name == "__setitem__":  # With a mask, as in `grad[grad.isnan()] = 0.0`.
        return isinstance(args[1], _Guarded) and not isinstance(args[2], Tensor)
    return name.startswith(("_foreach_", "_fused_", "_amp_")) and name not in FOREACH_REDUCTIONS


def _reaches_gang(collective: Any, args: Any, kwargs: Any) -> bool:
    """Returns whether a collective of torch mixes this shard with the shards of other ranks of the
    gang. Data-parallel ranks, which hold the same shard, may exchange it."""
    group = inspect.signature(collective).bind(*args, **kwargs).arguments.get("group")
    others = set(getattr(_origin(args, kwargs).gang, "global_ranks", ())) - {dist.get_rank()}
    return not others.isdisjoint(dist.get_process_group_ranks(group))


def _kept(result: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Returns ``result`` as a shard, if it has the shape of one."""
    origin = _origin(args, kwargs)
    if type(result) is not Tensor or (name in IN_PLACE and result.shape == origin.shape):
        return result
    is_grad = isinstance(origin, ShardedGrad)
    is_flat = result.ndim == 1 and (name in VECTOR or name in FLAT)
    if result.shape == origin.shape or is_flat or (is_grad and name in VALUES):
        kind = ShardedGrad if is_grad else ShardedTensor
        if result.is_sparse:  # Sparse tensors can't be viewed.
            return _become(result, kind, origin)
        shard: Any = result.as_subclass(kind)
        shard._shard = replace(origin._shard, is_vector=True) if name in VECTOR else origin._shard
        return shard
    if name in PIECES and (origin.ndim == 1 or result.dtype != origin.dtype):
        return result  # A piece, or bytes.
    raise ValueError(_refusal(name, args, kwargs))


def _become(tensor: Any, kind: type[ShardedTensor], origin: Any) -> Any:
    """Turns a plain tensor, in place, into a shard of the same table as ``origin``."""
    tensor.__class__, tensor._shard = kind, origin._shard
    return tensor


def _needs_graph(args: Any, kwargs: Any) -> bool:
    return torch.is_grad_enabled() and bool(_origin(args, kwargs).requires_grad)


def _origin(args: Any, kwargs: Any) -> Any:
    return next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Guarded))


def _refusal(name: str, args: Any, kwargs: Any) -> str:
    origin = _origin(args, kwargs)
    shape = tuple(origin.shape)
    table = "name" if origin._shard.name is None else repr(origin._shard.name)
    is_grad = isinstance(origin, ShardedGrad)
    rows = " To train some rows only, pass `train_rows`." if is_grad else ""
    what = "a vector of Parameters" if origin._shard.is_vector else "a tensor"
    return (
        f"`{name}` must be given the whole table, but is given a shard of it instead: {what} of "
        f"the shape {shape}, with the {origin._shard.table}. Call the layer that holds it: "
        "`embed(ids)`, `head(x)`, `head.loss(x, target)`. Or take `weight.full_tensor()`, on all "
        "ranks, or, for this rank's part on purpose, `weight.to_local()`. To leave the table "
        f"whole, pass `rules={{{table}: 'none'}}` to `shard_embeddings()`, or "
        f"`shard_head=False` for an output head.{rows}"
    )


class ShardedTensor(_Guarded, Tensor):
    """The result of an elementwise operation on a :class:`ShardedParameter`: a copy, a cast,
    ``weight.data``. It is saved as a plain tensor."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return local(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedTensor:
        with unguarded():
            copied = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = result = _become(copied, type(self), self)
        return result  # type: ignore[no-any-return]


class ShardedGrad(ShardedTensor):
    """The gradient of a :class:`ShardedParameter`. Reading ``grad`` changes the class of the plain
    tensor in place, so that its norm is the norm of the whole gradient."""


class FrameworkGrad(ShardedGrad):
    """A gradient that a framework knows to be sharded, by an attribute of its Parameter. The
    framework reduces norms itself, and reads gradients through ``data`` and ``detach()``."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        reduced: Any = NotImplemented
        if func.__name__ in OF_GRADIENTS:
            reduced = reduce_table(func.__name__, args, kwargs)
        if reduced is not NotImplemented:
            return reduced
        with unguarded():
            return func(*args, **kwargs)


def _mark_grads(func: Any, args: tuple[Any, ...], result: Any) -> None:
    """Marks the result of ``weight.grad`` or :func:`torch.autograd.grad`."""
    weights, grads = args[:1], (result,)
    if func is torch.autograd.grad:
        weights, grads = args[1], result
    for weight, grad in zip(weights, grads, strict=True):
        if isinstance(weight, ShardedParameter) and type(grad) is Tensor:
            is_known = getattr(weight, "tensor_model_parallel", False)
            shard: Any = grad
            shard.__class__ = FrameworkGrad if is_known else ShardedGrad
            shard._shard = weight._shard


def _with_marked_gradient(weight: Any, hook: Any) -> tuple[Any, Any]:
    """Returns the arguments of ``weight.register_hook(hook)``, with ``hook`` wrapped so that it
    gets the gradient as a shard, unless it is marked as shardwise."""
    shard = getattr(weight, "_shard", None)
    if not isinstance(weight, ShardedParameter) or getattr(hook, "_tp_embed_shardwise", False):
        return weight, hook

    def hook_of_shard(grad: Any) -> Any:
        if type(grad) is not Tensor:  # From a tracer.
            return hook(grad)
        result: Any = grad
        result.__class__, result._shard = ShardedGrad, shard
        try:
            result = hook(grad)
        finally:
            unmarked: Any
            for unmarked in (grad, result):  # Reading `weight.grad` marks them again.
                if hasattr(unmarked, "_shard"):
                    unmarked.__class__ = Tensor
        return result

    return weight, hook_of_shard


class ShardedParameter(_Guarded, Parameter):
    """This rank's shard of a table: the ``weight`` of a sharded layer over more than one rank.

    Elementwise operations work on the shard. ``sum()`` and ``mean()`` of all items reduce over the
    whole table, for penalties; all ranks of the gang must call them. Operations that would treat
    the shard as the table, such as products, indexing and transposes, raise :class:`ValueError`.

    It is saved as a plain Parameter; the layer it is loaded into makes it a shard again.
    """

    def __repr__(self) -> str:  # type: ignore[override]
        with unguarded():
            return f"{super().__repr__()}\n({self._shard.table})"

    def detach(self) -> Tensor:
        is_run = not torch.compiler.is_compiling()
        if is_run and sys._getframe(1).f_code is Parameter.__new__.__code__:
            raise ValueError(_refusal("torch.nn.Parameter", (self,), {}))
        return super().detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedParameter:
        if id(self) not in memo:
            with unguarded():
                copied: Any = Parameter(self.detach().clone(), self.requires_grad)
            copied.__class__ = ShardedParameter
            copied._shard = self._shard
            memo[id(self)] = copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with unguarded():
            data, requires_grad = self.detach(), self.requires_grad
        state = {key: value for key, value in vars(self).items() if key != "_shard"}
        if not state:
            return rebuild_parameter, (data, requires_grad, OrderedDict())
        return rebuild_parameter_with_state, (data, requires_grad, OrderedDict(), state)


# torch's optimizers and norms use their fast paths only for listed types, such as DTensor.
support_foreach(ShardedParameter, (ShardedGrad, FrameworkGrad))

# Don't compile calls from untraced code: the guards wouldn't distinguish `clone` from `detach`, and
# would run the graph of one for the other.
for _kind in (_Guarded, FrameworkGrad):
    never_compile(vars(_kind)["__torch_function__"].__func__)
