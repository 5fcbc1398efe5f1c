"""Checks that optimizers train a shard as they would train the whole table.

Most optimizers are elementwise, as Adam and SGD are, so a shard trains like its part of the table.
Others use the whole matrix: the means of its rows and columns (Adafactor; Shazeer and Stern, 2018),
its norm (LAMB; You et al., 2020), or its singular vectors (Muon; Jordan et al., 2024). They would
silently train a shard to different values.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tp_embed.mapped.store import store_of
from tp_embed.parameter.sharded import ShardedParameter, ShardedTensor


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Optimizers that use whole matrices, or all Parameters as one vector, by the lower-case name of the
# class, or its prefix; subclasses count.
_MATRIX = _names(
    """
    adalomo adammini adamp came dadapt dion dog fromage fusedlamb fusednovograd ldog nero novograd
    onebitlamb prodigy ranger sgdp singledevicemuon sm3 soap zerooneadam
    """
)
_FAMILIES = "adafactor", "distributedmuon", "galore", "lamb", "lars", "lbfgs", "muon", "shampoo"

# Elementwise optimizers outside torch, wrappers of another optimizer, which is checked as well, and
# those of `tp_embed.optim`, which know how a table is sharded.
_ELEMENTWISE_NAMES = _names(
    """
    acceleratedoptimizer adan deepspeedcpuadagrad deepspeedcpuadam deepspeedcpulion fusedadagrad
    fusedadam fusedlion fusedsgd lazyadam lion rowwiseadagrad rowwiseadam zeroredundancyoptimizer
    """
)

_ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    torch.optim.SparseAdam,
)

# The number of Parameters of an optimizer when it was checked, and the shards among them.
_checked: WeakKeyDictionary[Optimizer, tuple[int, list[Tensor]]] = WeakKeyDictionary()
_warned: set[type] = set()


def needs_matrix(optimizer: Any) -> bool:
    """Returns whether ``optimizer`` is known to use whole matrices.

    :param optimizer: an optimizer, its name, its class, or a partial of the class.
    """
    if isinstance(optimizer, str):
        key = _key(optimizer)
        return key in _MATRIX or key.startswith(_FAMILIES)
    made = getattr(optimizer, "func", optimizer)
    kind = made if isinstance(made, type) else type(made)
    return any(needs_matrix(base.__name__) for base in kind.__mro__)


def refuse(name: str, table: str) -> ValueError:
    """Returns the error for an optimizer that can't train the shards of ``table``."""
    return ValueError(
        f"The optimizer of {table} must treat each item by itself, but is `{name}` instead, which "
        "looks at whole matrices or vectors, and would train a shard to other values than its part "
        "of the table. Give the sharded tables an optimizer of their own, such as "
        "`torch.optim.AdamW`, or leave them whole with the strategy 'none'."
    )


def check_optimizer(optimizer: Any, tables: Iterable[Tensor]) -> None:
    """Checks an optimizer before ``tables`` are sharded.

    :raises ValueError: the optimizer uses whole matrices, or has states whose shape differs from
        the table's, so that they can't be sharded.
    """
    trained = _trained(optimizer)
    for table in tables:
        if table not in trained:
            continue
        shape = tuple(table.shape)
        if needs_matrix(optimizer):
            raise refuse(type(optimizer).__name__, f"a table of the shape {shape}")
        for key, value in optimizer.state.get(table, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != table.shape:
                raise ValueError(
                    f"The states of `optimizer` for a table of the shape {shape} must have that "
                    f"shape to be sharded with it, but '{key}' has {tuple(value.shape)} instead. "
                    "Make the optimizer after the tables are sharded."
                )


def forget() -> None:
    """Checks every optimizer again at its next step, after Parameters were replaced."""
    _checked.clear()


def mark_replaced(table: Tensor) -> None:
    """Marks ``table`` as replaced by shards, so that an optimizer that still holds it raises."""
    table._replaced_by_tp_embed = True  # type: ignore[attr-defined]


def _check_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Runs before each step of every optimizer; checks its Parameters once."""
    if torch.compiler.is_compiling():
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if optimizer in _checked and _checked[optimizer][0] == count:
        return
    trained, kind = _trained(optimizer), type(optimizer)
    if any(hasattr(p, "_replaced_by_tp_embed") and p.grad is None for p in trained):
        raise ValueError(
            f"The `{kind.__name__}` must train the shards of the model's tables, but holds a whole "
            "table that `shard_embeddings()` has replaced. Make the optimizer afterwards, or pass "
            "it: `shard_embeddings(..., optimizer=optimizer)`."
        )
    is_safe = getattr(kind, "_tp_embed_keeps_files", False)
    if not is_safe and any(store_of(p) is not None for p in trained):
        raise ValueError(
            "The optimizer of a table in memory-mapped files must be one of `tp_embed.optim`, "
            f"which keeps its states in files too, but is a `{kind.__name__}` instead. Use "
            "`RowwiseAdagrad`, `RowwiseAdam` or `LazyAdam`."
        )
    shards = [p for p in trained if isinstance(p, ShardedParameter)]
    if shards and needs_matrix(optimizer):
        raise refuse(kind.__name__, "a sharded table")
    if shards and kind not in _warned and not _is_elementwise(kind):
        _warned.add(kind)
        warnings.warn(
            f"`{kind.__name__}` trains sharded tables, and is unknown to tp_embed. If it treats "
            "each item by itself, as Adam does, the tables train as if they were whole. If it "
            "looks at whole matrices, for example at their norms, they do not: give the tables an "
            "optimizer of their own, such as `torch.optim.AdamW`.",
            stacklevel=4,
        )
    _checked[optimizer] = count, list[Tensor](shards)


def _clean_states(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Runs after each step; turns states that are copies of gradients (SGD) into plain tensors."""
    if torch.compiler.is_compiling() or optimizer not in _checked:
        return
    for shard in _checked[optimizer][1]:
        for state in optimizer.state.get(shard, {}).values():
            if isinstance(state, ShardedTensor):
                plain: Any = state
                plain.__class__ = Tensor
                del plain._shard


def _trained(optimizer: Any) -> set[Tensor]:
    """Returns the Parameters, except groups that Muon trains with Adam."""
    groups = optimizer.param_groups
    return {p for group in groups if group.get("use_muon", True) for p in group["params"]}


def _is_elementwise(kind: type[Optimizer]) -> bool:
    step = inspect.unwrap(kind.step)
    known = any(step is inspect.unwrap(one.step) for one in _ELEMENTWISE)
    return known or _key(kind.__name__) in _ELEMENTWISE_NAMES


def _key(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


register_optimizer_step_pre_hook(_check_step)
register_optimizer_step_post_hook(_clean_states)
