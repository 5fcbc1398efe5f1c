"""The loss of a causal language model, from the logits of each rank."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tp_embed.head import OutputHead
from tp_embed.loss import cross_entropy


def shard_logits(model: Any) -> None:
    """Lets ``model`` compute its loss from the logits of each rank, where it is given labels: N
    ceil(V/P) of them are held in the place of N V, and two fp32 numbers for each token are
    all-reduced in the place of an all-gather of logits.

    Then ``outputs.logits`` are those of this rank's classes. Where there are no labels, as in
    ``model.generate()``, all logits are put together as before.

    :param model: a model with a ``loss_function``, such as ``LlamaForCausalLM``, of which the
        output head is sharded over the vocabulary.
    :raises ValueError: the head is not, or the model has a loss of its own (T5).
    """
    head = model.get_output_embeddings()
    if not isinstance(head, OutputHead) or head.shard_dim != 0:
        raise ValueError(
            "The output head of `model` must be an `OutputHead` over the vocabulary, but is "
            f"{head} instead. Shard it with `shard_embeddings(model, gang, strategy='vocab')`."
        )
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" not in forward.__code__.co_names:
        raise ValueError(
            f"`model` must compute its loss with its `loss_function`, but a "
            f"`{type(model).__name__}` does not. Take its hidden states and `OutputHead.loss()`."
        )
    signature = inspect.signature(forward)

    def choose_logits(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(module, *args, **kwargs).arguments
        given |= given.get("kwargs", {})
        has_labels = any(given.get(name) is not None for name in ("labels", "shift_labels"))
        head.output = "shard" if has_labels else "replicated"

    model.register_forward_pre_hook(choose_logits, with_kwargs=True)
    model.loss_function = _CausalLMLoss(head)


class _CausalLMLoss:
    """``ForCausalLMLoss`` of transformers, of rank-local logits."""

    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            # Token n is to predict token n + 1, and the last one nothing.
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = cross_entropy(
            logits,
            shift_labels.to(logits.device),
            self._head.gang,
            self._head.partition,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch
