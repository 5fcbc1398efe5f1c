"""The loss of a causal language model from rank-local logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from tp_embed.nn.head import OutputHead
from tp_embed.nn.loss import cross_entropy


def shard_logits(model: Any) -> None:
    """Makes ``model`` compute its loss from rank-local logits when it gets labels. Holds N
    ceil(V/P) logits instead of N V, and all-reduces three fp32 numbers per token instead of
    all-gathering logits.

    With labels, ``outputs.logits`` are the logits of this rank's classes. Without labels, as in
    ``model.generate()``, logits are gathered as before.

    :param model: a causal language model, such as ``LlamaForCausalLM``, whose output head is
        sharded over the vocabulary. Between head and loss, its ``forward`` may treat all logits
        alike, as soft-capping does, but must not select logits by class, as Chameleon does.
    :raises ValueError: the head is not sharded over the vocabulary, the model does not use the loss
        of causal language models, or its loss cannot be replaced (T5).
    """
    head = model.get_output_embeddings()
    if not isinstance(head, OutputHead) or head.shard_dim != 0:
        raise ValueError(
            "The output head of `model` must be an `OutputHead` over the vocabulary, but is "
            f"{head} instead. Shard it with `shard_embeddings(model, gang, strategy='vocab')`."
        )
    check_loss(model)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, always_call=True)
    model.loss_function = _CausalLMLoss(head)


def check_loss(model: Any) -> None:
    """
    :raises ValueError: :func:`shard_logits` cannot compute the loss of ``model``.
    """
    name = type(model).__name__
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        raise ValueError(
            f"`model` must compute its loss with its `loss_function`, but a `{name}` does not. "
            "Take its hidden states and `OutputHead.loss()`."
        )
    loss = model.loss_function
    if loss is not ForCausalLMLoss:
        found = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(
            "The `loss_function` of `model` must be `ForCausalLMLoss` of transformers, but for "
            f"this `{name}` is `{found}` instead. Compute that with "
            "`tp_embed.nn.loss.cross_entropy()`, or leave the logits whole."
        )


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = inspect.signature(inspect.unwrap(type(model).forward))
    given = signature.bind_partial(model, *args, **kwargs).arguments
    given |= given.get("kwargs", {})
    if any(given.get(name) is not None for name in ("labels", "shift_labels")):
        model.get_output_embeddings().output = "shard"


def _after_forward(model: Any, args: tuple[Any, ...], output: object) -> None:
    model.get_output_embeddings().output = "replicated"


class _CausalLMLoss:
    """``ForCausalLMLoss`` of transformers for rank-local logits."""

    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None  # Only called with labels.
            # Token n predicts token n + 1, and the last one predicts nothing.
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = cross_entropy(
            logits.flatten(0, -2),
            shift_labels.to(logits.device).flatten(),
            self._head.gang,
            self._head.partition,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch
