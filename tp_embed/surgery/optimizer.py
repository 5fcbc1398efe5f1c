"""Replaces whole tables by their shards in an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from tp_embed.partition import as_slice

# As an optimizer takes them: Parameters or `(name, Parameter)` pairs, or groups of them.
Groups = list[Any]


@dataclass(frozen=True)
class Shard:
    """A Parameter that replaces a whole table, with the block of the table it holds."""

    parameter: Parameter
    rows: range
    columns: range

    def cut(self, whole: Tensor) -> Tensor:
        """Copies this block out of a tensor of the shape of the table."""
        return whole[as_slice(self.rows), as_slice(self.columns)].clone()


Shards = Mapping[Tensor, Shard]


def check_groups(name: str, groups: object, model: Module) -> None:
    """
    :raises TypeError: ``groups`` is not a list of Parameters, pairs or groups.
    :raises ValueError: it holds no Parameter of ``model``.
    """
    if not isinstance(groups, list):
        raise TypeError(
            f"`{name}` must be a list, so that its Parameters can be replaced, but is a "
            f"`{type(groups).__name__}` instead. Make it one: `list(...)`."
        )
    found = []
    for entry in groups:
        if isinstance(entry, dict) and "params" in entry:
            params = entry["params"]
            # A generator becomes a list, since it is read twice.
            entry["params"] = [params] if isinstance(params, Tensor) else list(params)
            found += entry["params"]
        else:
            found.append(entry)
    found = [entry[1] if isinstance(entry, tuple) else entry for entry in found]
    wrong = {type(entry).__name__ for entry in found if not isinstance(entry, Tensor)}
    if wrong:
        raise TypeError(
            f"`{name}` must hold Parameters, or parameter groups with `params`, "
            f"but holds {sorted(wrong)} instead."
        )
    own = set(model.parameters())
    if not any(parameter in own for parameter in found):
        raise ValueError(
            f"`{name}` must hold Parameters of `model`, but holds none of them. Build it over "
            "`model.parameters()`."
        )


def repoint_groups(groups: Groups, shards: Shards) -> None:
    """Replaces the tables in ``groups``, in place. Run :func:`check_groups` before."""
    for i, entry in enumerate(groups):
        if isinstance(entry, dict):
            repoint_groups(entry["params"], shards)
        elif isinstance(entry, tuple):
            groups[i] = entry[0], _repointed(entry[1], shards)
        else:
            groups[i] = _repointed(entry, shards)


def repoint_optimizer(optimizer: Optimizer, shards: Shards) -> None:
    """Replaces the tables in the parameter groups of ``optimizer``, in place. Cuts states of the
    shape of a table, such as moments; keeps others, such as step counts."""
    repoint_groups(optimizer.param_groups, shards)
    for whole in [whole for whole in optimizer.state if whole in shards]:
        shard, state = shards[whole], optimizer.state.pop(whole)
        optimizer.state[shard.parameter] = {
            key: shard.cut(value)
            if isinstance(value, Tensor) and value.shape == whole.shape
            else value
            for key, value in state.items()
        }


def _repointed(parameter: Any, shards: Shards) -> Any:
    return shards[parameter].parameter if parameter in shards else parameter
