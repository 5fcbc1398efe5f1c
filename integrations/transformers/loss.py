"""The loss of a model from hidden states, or from rank-local logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from tp_embed.nn.head import OutputHead
from tp_embed.nn.loss import cross_entropy

_LABELS = frozenset({"labels", "shift_labels"})


def fuse_loss(model: Module, *, in_evaluation: bool = False) -> None:
    """Makes ``model`` compute its loss from hidden states when it is trained with labels, by
    :meth:`tp_embed.OutputHead.loss`: a chunk of tokens at a time, so that logits are never held.

    The head then returns :class:`~tp_embed.nn.deferred.DeferredLogits`. The ``forward`` may treat
    these as models do: slice, scale and cap them, add a bias, and pass them to
    ``torch.nn.functional.cross_entropy``, also by ``model.loss_function`` or ``CrossEntropyLoss``.
    Anything else raises, also with ``outputs.logits``. The loss is in fp32. Without labels and, by
    default, in evaluation, logits are whole.

    :param model: a model of transformers, or a module around one, as of PEFT, whose output head is
        sharded, along either dimension.
    :param in_evaluation: also after ``model.eval()``. Then metrics get no logits.
    :raises ValueError: the head is not sharded, the ``forward`` takes no labels, or the model has
        :func:`shard_logits`.
    """
    found = fusible_model(model)
    if not _heads(found):
        raise ValueError(
            "The output head of `model` must be an `OutputHead` to fuse its loss, but is "
            f"{found.get_output_embeddings()} instead. Shard it with `shard_embeddings(model, "
            "gang)`."
        )
    _hook(found, "deferred", in_evaluation)


def fusible_model(model: Module) -> Any:
    """Returns the model of transformers in ``model`` whose loss can be fused.

    :raises ValueError: there is not exactly one, or it has no head or takes no labels.
    """
    models = list(_outermost(model))
    if len(models) != 1:
        raise ValueError(
            f"`model` must be or hold one model of transformers to fuse its loss, but a "
            f"`{type(model).__name__}` holds {len(models)}. Call `fuse_loss()` for each, or, in "
            "other models, set `output='deferred'` of their `OutputHead`."
        )
    parameters = _signature(models[0]).parameters
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes_labels = has_kwargs or not _LABELS.isdisjoint(parameters)
    if models[0].get_output_embeddings() is None or not takes_labels:
        raise ValueError(
            "`model` must have an output head and take `labels` to fuse its loss, but a "
            f"`{type(models[0]).__name__}` does not. Leave out `fuse_loss`, or take a class with a "
            "loss, such as `LlamaForCausalLM` for a `LlamaModel`."
        )
    return models[0]


def _outermost(module: Module) -> Iterator[Any]:
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def shard_logits(model: Any) -> None:
    """Makes ``model`` compute its loss from rank-local logits when it gets labels. Holds N
    ceil(V/P) logits instead of N V, and all-reduces three fp32 numbers per token instead of
    all-gathering logits.

    With labels, ``outputs.logits`` are the logits of this rank's classes,
    :class:`~tp_embed.nn.local_logits.LocalLogits`, which raise where all classes are needed.
    Without labels, as in ``model.generate()``, logits are gathered as before.

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
    _hook(model, "shard", in_evaluation=True)
    model.loss_function = _CausalLMLoss(head)


def has_local_logits(model: Any) -> bool:
    """Returns whether ``model`` has the logits of each rank's classes, see :func:`shard_logits`."""
    loss = getattr(model, "loss_function", None)
    return isinstance(loss, _CausalLMLoss) and loss._head.gang.size > 1


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


def _hook(model: Any, output: Literal["shard", "deferred"], in_evaluation: bool) -> None:
    """Sets the ``output`` of the head of ``model`` while it runs with labels."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if getattr(hook, "func", None) is _before_forward:
            if hook.keywords["output"] != output:
                raise ValueError(
                    "`shard_logits` must be off with `fuse_loss`, which holds no logits, but both "
                    "are on. Choose one."
                )
            in_evaluation |= hook.keywords["in_evaluation"]
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    before = partial(_before_forward, output=output, in_evaluation=in_evaluation)
    model.register_forward_pre_hook(before, with_kwargs=True)
    if _after_forward not in model._forward_hooks.values():
        model.register_forward_hook(_after_forward, always_call=True)


def _before_forward(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    output: Literal["shard", "deferred"],
    in_evaluation: bool,
) -> None:
    signature = _signature(model)
    given = signature.bind_partial(model, *args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.get(name, {})
    has_labels = any(given.get(name) is not None for name in _LABELS)
    if has_labels and (model.training or in_evaluation):
        for head in _heads(model):
            head.output = output


def _after_forward(model: Any, args: tuple[Any, ...], output: object) -> None:
    for head in _heads(model):
        head.output = "replicated"


def _heads(model: Any) -> list[OutputHead]:
    """Returns the output head, or those in its wrapper of PEFT."""
    found = model.get_output_embeddings()
    modules = found.modules() if isinstance(found, Module) else ()
    return [module for module in modules if isinstance(module, OutputHead)]


def _signature(model: Any) -> inspect.Signature:
    return inspect.signature(inspect.unwrap(type(model).forward))


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
