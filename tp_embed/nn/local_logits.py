"""Logits of this rank's classes, which refuse to be used as the logits of all classes."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from tp_embed._torch_private import is_transformed
from tp_embed.gang.blocks import in_graph
from tp_embed.parameter.sharded import unguarded

__all__ = ["LocalLogits", "as_local_logits", "local_values"]

# What users call for values of all classes. Sums, products and maxima over this rank's classes are
# left to losses that combine them over the gang.
_OF_ALL = """
    __array__ argmax argmin argsort cosine_similarity cross_entropy cummax cumsum gumbel_softmax
    huber_loss kl_div kthvalue l1_loss log_softmax logcumsumexp logsumexp max mean median min
    msort mse_loss multinomial nll_loss normalize numpy quantile smooth_l1_loss softmax softmin
    sort std tolist topk var
"""
_NEEDS_ALL = frozenset(_OF_ALL.split())
# Fail, or not, by whether this rank has the class.
_PICKS = frozenset({"__getitem__", "gather", "index_select", "select", "take_along_dim", "where"})


class LocalLogits(Tensor):
    """What an :class:`~tp_embed.OutputHead` with ``output="shard"`` returns over several ranks. As
    a plain tensor, :func:`torch.softmax` and its like would normalize over this rank's classes
    only, and class 0 would be another one on each rank.

    Operations that keep the classes return the same kind, others a plain tensor.
    :func:`tp_embed.nn.loss.cross_entropy` takes them, and so do vocabulary-parallel losses of other
    libraries, which sum over ranks.

    :raises ValueError: an operation needs the logits of all classes.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name in _NEEDS_ALL:
            _refuse(name)
        with unguarded():
            try:
                result = func(*args, **(kwargs or {}))
            except (IndexError, RuntimeError):
                if name in _PICKS:
                    _refuse(name)
                raise
        logits = next((arg for arg in args if isinstance(arg, cls)), None)
        if not isinstance(result, Tensor) or logits is None:
            return result
        # A sum over the classes of V tokens has V numbers, too.
        is_sum = name != "__getitem__" and result.ndim == 1 < logits.ndim
        if result.shape[-1:] == logits.shape[-1:] and not is_sum:
            return result.as_subclass(cls) if type(result) is Tensor else result
        if name == "__getitem__" and result.ndim >= logits.ndim - 1 > 0:
            _refuse("indexing of classes")
        return local_values(result)


def as_local_logits(logits: Tensor) -> Tensor:
    """Returns ``logits`` as :class:`LocalLogits`. Graphs and transforms get a plain tensor."""
    if type(logits) is not Tensor or is_transformed() or in_graph(logits):
        return logits
    return logits.as_subclass(LocalLogits)


def local_values(logits: Tensor) -> Tensor:
    """Returns ``logits`` as a plain tensor. Tensors of graphs and transforms stay as they are."""
    if not isinstance(logits, LocalLogits):
        return logits
    with unguarded():
        return logits.as_subclass(Tensor)


def _refuse(name: str) -> NoReturn:
    raise ValueError(
        f"`{name}` must be given the logits of all classes, but is given those of this rank's "
        "instead, of a head with `output='shard'` or a model with `shard_logits`. Take the "
        "functions of hidden states, `head.loss(x, target)`, `log_probs`, `entropy`, `top_k`, or "
        "`tp_embed.nn.loss.cross_entropy()`. For all logits leave out `shard_logits`, or the "
        "labels; for this rank's values on purpose, take `logits.as_subclass(torch.Tensor)`."
    )
