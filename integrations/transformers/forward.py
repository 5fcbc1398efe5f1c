"""Finds models whose ``forward`` was replaced by one that reads the output head's weight."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.nn import Module
from transformers import PreTrainedModel

from tp_embed.nn.head import OutputHead

from .fused_head import is_fused_head, shard_fused_head

# Packages whose fused losses multiply by the head's weight themselves.
_FUSED = frozenset({"cut_cross_entropy", "liger_kernel", "trl", "unsloth", "unsloth_zoo"})


def check_forward(model: Module, heads: Collection[Module] = ()) -> None:
    """Checks the models of transformers in ``model`` whose output head is sharded, or will be, as
    one of ``heads``. The functions of TRL's fused head, if it is sharded, then use it.

    :raises ValueError: the ``forward`` of a model, on its class or on the object, was replaced by
        one that multiplies by the head's weight, which is only a shard on each rank.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        head = module.get_output_embeddings()
        is_sharded = isinstance(head, OutputHead) and head.gang.size > 1
        function = _replaced_forward(module)
        if function is None or not (is_sharded or head in heads):
            continue
        if is_fused_head(function):
            if is_sharded:
                shard_fused_head(module)
        elif _reads_head(function):
            raise ValueError(
                f"The `forward` of a `{type(module).__name__}` must call its output head if that "
                f"is sharded, but was replaced by `{function.__globals__['__name__']}."
                f"{function.__code__.co_name}`, which multiplies by the weight of the head itself. "
                "Leave the head whole, `shard_head=False`, or, where it is tied to a table, "
                "`tie_head=False`; or turn off that loss, and take `fuse_loss()` of "
                "`tp_embed.integrations.transformers`, which holds no logits either."
            )


def _replaced_forward(module: Any) -> Any:
    """Returns the function that replaced the original ``forward`` of the class of ``module``, or
    None."""
    function = vars(module).get("forward")
    if function is None:
        owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
        function = vars(owner)["forward"]
        while getattr(function, "__wrapped__", None) is not None and not _is_fused(function):
            function = function.__wrapped__  # Decorators of transformers.
        if _home(function) == owner.__module__:
            return None
    function = getattr(function, "__func__", function)
    return function if hasattr(function, "__code__") else None


def _reads_head(function: Any) -> bool:
    names = {*function.__code__.co_names, *function.__code__.co_freevars}
    names_head = not names.isdisjoint({"lm_head", "get_output_embeddings"})
    return _is_fused(function) or (names_head and "weight" in names)


def _is_fused(function: Any) -> bool:
    return _home(function).partition(".")[0] in _FUSED


def _home(function: Any) -> str:
    """Returns the module of the code: `functools.wraps` copies `__module__`."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))
