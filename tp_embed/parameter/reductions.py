"""Reductions over shards that return the result for the whole table, by a collective.

They cover common operations on gradients and weights: norms, as in
``torch.nn.utils.clip_grad_norm_``, checks for non-finite values, sums and extremes. All ranks of
the gang must call them, as with :class:`torch.distributed.tensor.DTensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tp_embed._torch_private import DisableTorchFunctionSubclass, foreach_norm, unscale
from tp_embed.gang import Gang, ReduceOperation
from tp_embed.gang.collectives import reduce_partial
from tp_embed.parameter.norms import gang_of, whole_norms

# Returned if a reduction isn't supported with the given arguments.
_NONE: Any = NotImplemented


def reduce_table(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes the reduction ``name`` over the whole tables of shards among the arguments. Returns
    ``NotImplemented`` for reductions over some dimensions, or if a gradient would be lost."""
    if name == _UNSCALE:
        return _unscale(*args, **kwargs)
    if name == _FOREACH_NORM:
        return _foreach_norm(*args, **kwargs)
    shard, *rest = args if args else (kwargs["input"],)
    if shard._shard.is_vector:
        return _NONE
    options = {key: value for key, value in kwargs.items() if key != "input"}
    if name in NORMS:
        return _norm(name, shard, *rest, **options)
    if rest or options.keys() - {"dtype"} or shard.shape != _shape(shard) or shard.is_sparse:
        return _NONE
    return _OF_ALL[name](shard, **options)


def _norm(
    name: str,
    shard: Any,
    order: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    p: Any = None,
    ord: Any = None,
    out: Any = None,
    dtype: torch.dtype | None = None,
) -> Any:
    order = next((given for given in (order, p, ord) if given is not None), None)
    # With a number, `linalg.norm` of a matrix is not an elementwise norm.
    named = order in (None, "fro") if name == "linalg_norm" else not isinstance(order, str)
    if not (named or order == "fro") or dim is not None or keepdim or out is not None:
        return _NONE
    if _needs_graph(shard):
        return _NONE
    order = 2.0 if order in (None, "fro") else float(order)
    if order < 0 and shard.ndim != 2:
        return _NONE
    return whole_norms([shard], shard.gang, order, dtype)[0]


def _foreach_norm(
    tensors: Sequence[Tensor], ord: float = 2, dtype: torch.dtype | None = None
) -> Any:
    if any(map(_needs_graph, tensors)):
        return _NONE
    plain = [tensor for tensor in tensors if gang_of(tensor) is None]
    norms = iter(foreach_norm(plain, ord, dtype) if plain else ())
    of_gangs = {
        gang: iter(whole_norms([t for t in tensors if gang_of(t) is gang], gang, float(ord), dtype))
        for gang in _gangs(tensors)
    }
    return tuple(next(of_gangs[gang] if (gang := gang_of(t)) else norms) for t in tensors)


def _unscale(grads: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Scales gradients and looks for infinite ones, as :class:`torch.amp.GradScaler` does."""
    with DisableTorchFunctionSubclass():
        unscale(list(grads), found_inf, inv_scale)
    for gang in _gangs(grads):
        found = found_inf.to(gang.device, copy=True).view(1)
        gang.all_reduce(found, ReduceOperation.MAX)
        found_inf.copy_(found.view_as(found_inf))


def _sum(shard: Any, dtype: torch.dtype | None = None) -> Tensor:
    plain = _plain(shard)
    low = plain.dtype in (torch.bfloat16, torch.float16)
    total = plain.sum(dtype=torch.float32 if low and dtype is None else dtype)
    total = reduce_partial(total.to(shard.gang.device), shard.gang).to(plain.device)
    return total.to(plain.dtype) if low and dtype is None else total


def _mean(shard: Any, dtype: torch.dtype | None = None) -> Tensor:
    count = torch.tensor(shard.numel(), device=shard.gang.device)
    shard.gang.all_reduce(count)
    mean: Tensor = _sum(shard, dtype) / count.to(shard.device)
    return mean


def _extreme(take: Callable[[Tensor], Tensor], neutral: float) -> Callable[..., Any]:
    def of_table(shard: Any) -> Any:
        if _needs_graph(shard):
            return _NONE
        plain = _plain(shard)
        if not plain.is_floating_point():
            plain = plain.double()
        own = take(plain) if plain.numel() else plain.new_full((), neutral)
        of_ranks = own.new_empty(shard.gang.size, device=shard.gang.device)
        shard.gang.all_gather(of_ranks, own.to(of_ranks.device))
        return take(of_ranks).to(device=plain.device, dtype=shard.dtype)

    return of_table


_max = _extreme(torch.amax, -torch.inf)
_min = _extreme(torch.amin, torch.inf)


def _any(shard: Any) -> Any:
    return _max(shard != 0)


def _all(shard: Any) -> Any:
    return _min(shard != 0)


_OF_ALL: dict[str, Callable[..., Any]] = {
    "all": _all,
    "amax": _max,
    "amin": _min,
    "any": _any,
    "max": _max,
    "mean": _mean,
    "min": _min,
    "sum": _sum,
}
NORMS = frozenset(("linalg_norm", "linalg_vector_norm", "norm"))
_FOREACH_NORM = foreach_norm.__name__
_UNSCALE = unscale.__name__
OF_GRADIENTS = NORMS | {_FOREACH_NORM, _UNSCALE}
REDUCTIONS = OF_GRADIENTS | _OF_ALL.keys()


def _gangs(tensors: Sequence[Tensor]) -> list[Gang]:
    """Returns the distinct gangs of ``tensors``, in order."""
    return list(dict.fromkeys(gang for tensor in tensors if (gang := gang_of(tensor))))


def _shape(shard: Any) -> tuple[int, ...]:
    """Returns the shape of ``shard`` if it is flat or a block of the table, else ``()``."""
    own = shard._shard.partition.shard(shard.gang.rank)
    fits = shard.ndim == 1 or (shard.ndim == 2 and shard.size(shard.shard_dim) == len(own))
    return tuple(shard.shape) if fits else ()


def _plain(shard: Tensor) -> Tensor:
    with DisableTorchFunctionSubclass():
        return shard.view_as(shard).as_subclass(Tensor)


def _needs_graph(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad
