"""TRL's trainers, whose fused head multiplies by the weight of the output head itself."""

from __future__ import annotations

from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from tp_embed.nn.head import OutputHead

# What `add_fused_lm_head` of TRL 1.16 calls for the values of tokens, within a context that gathers
# the weight at ZeRO 3.
_VALUES = "_ChunkedLogProbFunction"
_GATHER = "maybe_gather_lm_head_ctx"

Values = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def is_fused_head(function: Any) -> bool:
    """Returns whether a ``forward`` is of TRL's ``add_fused_lm_head``, so that
    :func:`shard_fused_head` can change it."""
    return {_VALUES, _GATHER} <= {*function.__code__.co_names}


def shard_fused_head(model: Any) -> None:
    """Makes the ``forward`` that TRL's ``add_fused_lm_head`` gave to ``model`` compute log-probs,
    entropies and metrics with the sharded output head, by its functions of hidden states. TRL's
    code around them stays: masks, router losses, and the loss of each trainer. Idempotent.

    :param model: a model of transformers whose output head is an :class:`~tp_embed.OutputHead`.
    """
    function = model.forward.__func__
    if isinstance(function.__globals__[_VALUES], _TokenValues):
        return
    # At ZeRO 3 the head gathers its weight itself, and keeps it for the backward.
    known = {**function.__globals__, _VALUES: _TokenValues(model), _GATHER: _gather_nothing}
    code, name = function.__code__, function.__name__
    changed = FunctionType(code, known, name, function.__defaults__, function.__closure__)
    changed.__kwdefaults__ = function.__kwdefaults__
    changed.__dict__.update(function.__dict__)  # The signature, by `functools.wraps`.
    model.forward = MethodType(changed, model)


def _gather_nothing(*parameters: Any) -> Any:
    return nullcontext()


class _TokenValues:
    """Takes the place of TRL's autograd function."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        chunk_size: int,
        soft_cap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> Values:
        """
        :param x: *Shape:* :math:`(N,E)`.
        :param target: *Shape:* :math:`(N)`.
        :param outputs: which values TRL wants, besides log-probs.
        :returns: log-probs, entropy, log of the sum of squared probabilities, mean logit, and
            whether the target has the largest logit. *Shape:* :math:`(N)`.
        """
        head: Any = self._model.get_output_embeddings()
        if not isinstance(found := head, OutputHead) or found.weight is not weight:
            raise ValueError(
                f"The output head of `model` must still be its `OutputHead`, but is {head}. Call "
                "TRL's `add_fused_lm_head` again if you have replaced the head."
            )
        if soft_cap is not None and logit_scale != 1.0:
            raise ValueError(
                "TRL's fused head supports a soft cap or a scale of a sharded head, but not both, "
                "as this model has. Leave the head whole: `shard_head=False`."
            )
        cap: dict[str, Any] = {"soft_cap": soft_cap}
        heat = temperature / logit_scale  # What divides the logits, after the cap.
        log_probs = head.log_probs(x, target, heat, **cap)
        entropy = head.entropy(x, heat, **cap) if "entropy" in outputs else None
        squares = mean = is_top = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                # With l the logits and Z their sum of exponentials: 2 (l - log Z(l)) - (2 l -
                # log Z(2 l)) is log Z(2 l) - 2 log Z(l).
                squares = 2 * log_probs - head.log_probs(x, target, heat / 2, **cap)
            if {"mean_logits", "is_top1"} & {*outputs}:
                top, ids = (found[:, 0] for found in head.top_k(x, 1, **cap))
                is_top = ids == target
                if "mean_logits" in outputs:
                    # Smoothing by 1 gives log Z - the mean.
                    log_sum = top - head.log_probs(x, ids, **cap)
                    smooth = head.loss(x, target, label_smoothing=1.0, reduction="none", **cap)
                    mean = (log_sum - smooth) / heat
        return log_probs, entropy, squares, mean, is_top if "is_top1" in outputs else None
