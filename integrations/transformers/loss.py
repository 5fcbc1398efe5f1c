"""The loss of a causal language model, from the logits of each rank."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from tp_embed.nn.head import OutputHead
from tp_embed.nn.loss import cross_entropy


def shard_logits(model: Any) -> None:
    """Lets ``model`` compute its loss from the logits of each rank, where it is given labels: N
    ceil(V/P) of them are held in the place of N V, and three fp32 numbers for each token are
    all-reduced in the place of an all-gather of logits.

    Then ``outputs.logits`` are those of this rank's classes. Where there are no labels, as in
    ``model.generate()``, all logits are put together as before.

    :param model: a causal language model, such as ``LlamaForCausalLM``, of which the output head is
        sharded over the vocabulary. Its ``forward`` must not look at logits by their class between
        head and loss (Chameleon does); what it does to all alike, such as soft-capping, is right.
    :raises ValueError: the head is not sharded so, or the model has another loss than that of
        causal language models, or one that cannot be replaced (T5).
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
    :raises ValueError: the loss of ``model`` is not one that :func:`shard_logits` can compute.
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
    """``ForCausalLMLoss`` of transformers, of rank-local logits."""

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
            assert labels is not None  # Or this would not be called.
            # Token n is to predict token n + 1, and the last one nothing.
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
