"""Norms over Parameters that may be shards, equal to the norms of the unsharded model.

:mod:`torch.nn.utils` would count only the rank's own shard, and give each rank a different norm.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.nn.utils import get_total_norm as torch_total_norm

from tp_embed._torch_private import DisableTorchFunctionSubclass
from tp_embed.gang import Gang


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips gradients as :func:`torch.nn.utils.clip_grad_norm_`, for a model with sharded tables:
    scales all gradients in place, so that their norm is at most ``max_norm``.

    The norm covers the whole model and is the same on every rank. Each shard counts on its own
    rank; any other Parameter, which all ranks hold, counts once. Gradients may be dense or sparse.
    With data parallelism, average them first, as
    :class:`~torch.nn.parallel.DistributedDataParallel` does in the backward.

    Collective: all ranks of a gang must call it, with their shards in the same order. Does one
    all-gather per gang, of 4 bytes per table.

    :param parameters: the Parameters to clip the gradients of, or a single one.
    :param max_norm: the maximum norm.
    :param norm_type: the order p of the norm, may be ``inf``.
    :param error_if_nonfinite: whether to raise if the norm is not finite.
    :param foreach: as in torch, for gradients that are not shards.
    :returns: the norm before clipping. *Shape:* :math:`()`.
    :raises RuntimeError: the norm is not finite and ``error_if_nonfinite`` is true; raised on all
        ranks.
    """
    if not isinstance(parameters, Tensor):
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2
            )
    listed = [parameters] if isinstance(parameters, Tensor) else parameters
    gradients = [(_gradient(parameter), gang_of(parameter)) for parameter in listed]
    norm = _total_norm(
        [(gradient, gang) for gradient, gang in gradients if gradient is not None],
        norm_type,
        error_if_nonfinite,
        foreach,
    )
    clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Computes :func:`torch.nn.utils.get_total_norm` of tensors that may be shards: the norm of all
    of them as one vector, as if no table were sharded.

    A tensor is recognized as a shard if it is the weight of a sharded layer or its ``.grad``, as in
    ``get_total_norm([p.grad for p in model.parameters() if p.grad is not None])``. Any other tensor
    counts as the same on all ranks: don't pass copies of gradients.

    Collective: all ranks of a gang must call it, with their shards in the same order. Does one
    all-gather per gang, of 4 bytes per shard.

    :param tensors: the tensors, or a single one, dense or sparse.
    :param norm_type: the order p of the norm, may be ``inf``.
    :param error_if_nonfinite: whether to raise if the norm is not finite.
    :param foreach: as in torch, for tensors that are not shards.
    :returns: the norm. *Shape:* :math:`()`.
    :raises RuntimeError: the norm is not finite and ``error_if_nonfinite`` is true; raised on all
        ranks.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    pairs = [(tensor, gang_of(tensor)) for tensor in tensors]
    return _total_norm(pairs, norm_type, error_if_nonfinite, foreach)


def gang_of(tensor: Tensor) -> Gang | None:
    """Returns the gang of ``tensor`` if it is a shard, else ``None``."""
    gang = getattr(tensor, "gang", None)
    return gang if isinstance(gang, Gang) else None


@torch.no_grad()
def whole_norms(
    shards: Sequence[Tensor], gang: Gang, order: float, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Computes the norm of the whole table for each of ``shards``, by one all-gather.

    Computes and sends each rank's norm in at least fp32, so that the norm of a table in bf16 or
    fp16 is rounded once, as without shards.

    :param shards: shards over one gang; they may be empty on some ranks.
    :param order: the order p of the norms.
    :param dtype: the dtype of the norms; if ``None``, each has the dtype of its shard.
    :returns: a norm for each shard. *Shape:* :math:`()`.
    """
    plain = [_items(shard, order) for shard in shards]
    wide = torch.float64 if any(p.dtype == torch.float64 for p in plain) else torch.float32
    own = torch.stack([_norm(p, order, wide).to(gang.device) for p in plain])
    of_ranks = own.new_empty(gang.size, len(own))
    gang.all_gather(of_ranks, own)
    # Order 0 counts items, which add up; for any other order, the norm of norms is the total norm.
    whole = of_ranks.sum(0) if order == 0 else torch.linalg.vector_norm(of_ranks, order, dim=0)
    return [
        norm.to(device=p.device, dtype=dtype or p.dtype)
        for norm, p in zip(whole.unbind(), plain, strict=True)
    ]


def _total_norm(
    tensors: Sequence[tuple[Tensor, Gang | None]],
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
) -> Tensor:
    """Computes the norm of all tensors, some of them shards over a gang."""
    norm_type = float(norm_type)
    norms: list[Tensor] = []
    places: dict[Gang, list[int]] = {}
    for i, (tensor, gang) in enumerate(tensors):
        norms.append(tensor if gang else _items(tensor, norm_type))
        if gang:
            places.setdefault(gang, []).append(i)
    for gang, shards in places.items():
        found = whole_norms([norms[i] for i in shards], gang, norm_type)
        # The norm of a scalar is itself, so torch can use it instead of the table.
        for i, norm in zip(shards, found, strict=True):
            norms[i] = norm
    return torch_total_norm(norms, norm_type, error_if_nonfinite, foreach)


def _gradient(parameter: Tensor) -> Tensor | None:
    """Returns the gradient; empty for a shard without one, since another rank may have one."""
    gradient = parameter.grad
    if gradient is None and parameter.requires_grad and gang_of(parameter):
        return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return gradient


def _items(tensor: Tensor, order: float) -> Tensor:
    """Returns the items of ``tensor`` that affect the norm, as a plain dense tensor."""
    with DisableTorchFunctionSubclass():
        tensor = tensor.detach()
        if not tensor.is_sparse:
            return tensor
        # Negative orders depend on the zeros too.
        return tensor.to_dense() if order < 0 else tensor.coalesce().values()


def _norm(items: Tensor, order: float, dtype: torch.dtype) -> Tensor:
    if not items.numel():  # Return the neutral element; torch raises for some orders.
        return items.new_full((), torch.inf if order < 0 else 0, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(items, order, dtype=dtype)
    return norm
