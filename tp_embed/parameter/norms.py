"""Norms over Parameters of which some are shards: equal to the norms of the unsharded model.

:mod:`torch.nn.utils` on each rank would count a rank's own shard only, and so give every rank
another norm.
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
    """:func:`torch.nn.utils.clip_grad_norm_` for a model with sharded tables: scales all gradients,
    in place, so that their norm is at most ``max_norm``.

    The norm is that of the whole model, the same on every rank. Each shard counts once on its own
    rank, and every other Parameter, which all ranks hold alike, counts once in all. Gradients are
    dense or sparse. With data parallelism, average them first, as
    :class:`~torch.nn.parallel.DistributedDataParallel` does in the backward.

    All ranks of a gang have to call it, with their shards in the same order. It sends one
    all-gather for each gang, of 4 bytes for each table.

    :param parameters: the Parameters whose gradients are clipped, or one of them.
    :param max_norm: the largest norm that is left as it is.
    :param norm_type: the order p of the norm, ``inf`` included.
    :param error_if_nonfinite: whether a norm that is not finite is an error.
    :param foreach: as in torch, about the gradients that are not of shards.
    :returns: the norm before clipping. *Shape:* :math:`()`.
    :raises RuntimeError: the norm is not finite, with ``error_if_nonfinite``; on all ranks alike.
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
    """:func:`torch.nn.utils.get_total_norm` for tensors of which some are shards: the norm of all
    of them as if they were one vector, and no table was cut.

    A tensor is known as a shard if it is the weight of a sharded layer or its ``.grad``, as in
    ``get_total_norm([p.grad for p in model.parameters() if p.grad is not None])``. Any other one
    counts as one that all ranks hold alike: do not pass copies of gradients.

    All ranks of a gang have to call it, with their shards in the same order. It sends one
    all-gather for each gang, of 4 bytes for each shard.

    :param tensors: the tensors, or one of them, dense or sparse.
    :param norm_type: the order p of the norm, ``inf`` included.
    :param error_if_nonfinite: whether a norm that is not finite is an error.
    :param foreach: as in torch, about the tensors that are not shards.
    :returns: the norm. *Shape:* :math:`()`.
    :raises RuntimeError: the norm is not finite, with ``error_if_nonfinite``; on all ranks alike.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    pairs = [(tensor, gang_of(tensor)) for tensor in tensors]
    return _total_norm(pairs, norm_type, error_if_nonfinite, foreach)


def gang_of(tensor: Tensor) -> Gang | None:
    """The gang that ``tensor`` is a shard over, if it is one."""
    gang = getattr(tensor, "gang", None)
    return gang if isinstance(gang, Gang) else None


@torch.no_grad()
def whole_norms(
    shards: Sequence[Tensor], gang: Gang, order: float, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The norms of the tables that ``shards`` are cut out of, by one all-gather.

    Each rank's norm is computed and sent in fp32 at least. So the norm of a table in bf16 or fp16
    is rounded once, as without shards.

    :param shards: of one gang; those of other ranks may be empty.
    :param order: the order p of the norms.
    :param dtype: of the norms; if ``None``, each has the dtype of its shard.
    :returns: a norm for each. *Shape:* :math:`()`.
    """
    plain = [_items(shard, order) for shard in shards]
    wide = torch.float64 if any(p.dtype == torch.float64 for p in plain) else torch.float32
    own = torch.stack([_norm(p, order, wide).to(gang.device) for p in plain])
    of_ranks = own.new_empty(gang.size, len(own))
    gang.all_gather(of_ranks, own)
    # Counts of items add up; any other norm of norms is the norm of all.
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
    """The norm of all tensors, of which some are shards over a gang."""
    norm_type = float(norm_type)
    norms: list[Tensor] = []
    places: dict[Gang, list[int]] = {}
    for i, (tensor, gang) in enumerate(tensors):
        norms.append(tensor if gang else _items(tensor, norm_type))
        if gang:
            places.setdefault(gang, []).append(i)
    for gang, shards in places.items():
        found = whole_norms([norms[i] for i in shards], gang, norm_type)
        # The norm of a norm is that norm, so torch can take it for the table.
        for i, norm in zip(shards, found, strict=True):
            norms[i] = norm
    return torch_total_norm(norms, norm_type, error_if_nonfinite, foreach)


def _gradient(parameter: Tensor) -> Tensor | None:
    """The gradient, which is empty for a shard without one: another rank may have one."""
    gradient = parameter.grad
    if gradient is None and parameter.requires_grad and gang_of(parameter):
        return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return gradient


def _items(tensor: Tensor, order: float) -> Tensor:
    """A plain dense tensor of the items of ``tensor`` that count."""
    with DisableTorchFunctionSubclass():
        tensor = tensor.detach()
        if not tensor.is_sparse:
            return tensor
        # A negative order looks at the zeros too.
        return tensor.to_dense() if order < 0 else tensor.coalesce().values()


def _norm(items: Tensor, order: float, dtype: torch.dtype) -> Tensor:
    if not items.numel():  # Changes no norm. Torch refuses some orders here.
        return items.new_full((), torch.inf if order < 0 else 0, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(items, order, dtype=dtype)
    return norm
