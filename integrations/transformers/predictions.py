"""Predictions of a Trainer whose model has the logits of each rank's classes only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from tp_embed._torch_private import tree_leaves
from tp_embed.nn.local_logits import LocalLogits

from .loss import has_local_logits

_FIX = (
    "Leave out `shard_logits`, for whole logits, or take `prediction_loss_only=True`, for the loss "
    "only, or a `preprocess_logits_for_metrics` that returns what all ranks have in common."
)


def guard_predictions(model: Any, args: Any) -> None:
    """Refuses predictions from logits of each rank's classes, for the Trainer whose constructor
    calls this. The Trainer would gather them, over NCCL into a plain tensor, as if they were more
    rows.

    :param args: the Trainer's. Does nothing with ``prediction_loss_only``.
    :raises ValueError: the Trainer has ``compute_metrics``, which would be given such logits.
    """
    trainer = _constructing()
    if trainer is None or args.prediction_loss_only or not has_local_logits(model):
        return
    process = trainer.preprocess_logits_for_metrics
    if trainer.compute_metrics is not None and process is None:
        raise ValueError(
            "`compute_metrics` must be given the logits of all classes, but with `shard_logits` "
            f"each rank has the logits of its own only. {_FIX}"
        )
    trainer.preprocess_logits_for_metrics = _checked(process)


def _constructing() -> Trainer | None:
    """Returns the Trainer whose constructor runs. Callbacks are not given it."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def _checked(process: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
    def checked(logits: Any, labels: Any) -> Any:
        found = logits if process is None else process(logits, labels)
        for leaf in tree_leaves(found):
            if isinstance(leaf, LocalLogits):
                raise ValueError(
                    "Predictions must be made from the logits of all classes, but with "
                    f"`shard_logits` each rank has the logits of its own only. {_FIX}"
                )
        return found

    return checked
