"""Finds the tables of a model, in embeddings and output heads, with all modules that share them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from tp_embed.nn.embedding import StandardEmbedding

_STATE_DICT_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Place:
    """Where a module is registered: ``parent.attribute``, ``name`` seen from the model."""

    parent: Module
    attribute: str
    name: str


@dataclass(frozen=True)
class TableGroup:
    """One table: its weight, and the modules that use it with their places. ``others`` describes
    users that are neither embeddings nor heads. ``computed`` marks a weight that is no Parameter.
    An untied output head is a table without embeddings."""

    weight: Tensor
    computed: bool = False
    embeddings: dict[Module, list[Place]] = field(default_factory=dict)
    heads: dict[nn.Linear, list[Place]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> list[Tensor]:
        """The weight, and the biases of the heads."""
        return [self.weight, *(head.bias for head in self.heads if head.bias is not None)]

    @property
    def names(self) -> list[str]:
        """The names of all embeddings, or of the head if there are none; ``""`` for a model that is
        a table itself."""
        modules = self.embeddings or self.heads
        return [name for places in modules.values() for name in _names(places)]

    @property
    def shared_with(self) -> list[str]:
        """The names of the modules tied to the first of :attr:`names`."""
        heads = [name for places in self.heads.values() for name in _names(places)]
        return self.names[1:] + (heads if self.embeddings else [])


def _names(places: list[Place]) -> list[str]:
    return [place.name for place in places] or [""]


def find_places(model: Module) -> dict[Module, list[Place]]:
    """Returns all modules of ``model`` with all their places, in the order of the model."""
    places: dict[Module, list[Place]] = {model: []}
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(child, []).append(Place(parent, attribute, name))
    return places


def find_tables(model: Module, heads: Collection[Module] = ()) -> list[TableGroup]:
    """Returns the tables of the ``nn.Embedding`` and :class:`StandardEmbedding` modules of
    ``model``, and of ``heads``, in the order of the model."""
    places = find_places(model)
    groups: dict[Parameter | Module, TableGroup] = {}
    for module, module_places in places.items():
        if isinstance(module, (nn.Embedding, StandardEmbedding)) or module in heads:
            weight = module._parameters.get("weight")
            new = TableGroup(module.weight, computed=weight is None)  # type: ignore[arg-type]
            group = groups.setdefault(module if weight is None else weight, new)
            if module not in heads:
                group.embeddings[module] = module_places
    for module, module_places in places.items():
        for attribute, parameter in module._parameters.items():
            if parameter not in groups or module in groups[parameter].embeddings:
                continue
            if is_plain_head(module):
                groups[parameter].heads[module] = module_places
            else:
                name = ".".join([*filter(None, _names(module_places)[:1]), attribute])
                groups[parameter].others.append(f"'{name}' of a `{type(module).__name__}`")
    return list(groups.values())


def _runs(module: Module, forward: Callable[..., object]) -> bool:
    return type(module).forward is forward and "forward" not in vars(module)


def check_weight(group: TableGroup, shape: tuple[int, ...]) -> None:
    """
    :param shape: the shape of the whole weight; this rank may hold a part of it.
    :raises ValueError: the weight of the table is not a whole Parameter of a floating dtype.
    """
    name = group.names[0]
    if group.computed:
        raise ValueError(
            f"The table '{name}' must hold its `weight` as a Parameter, but computes it (a "
            f"parametrization?) instead. {skip(name)}"
        )
    if not group.weight.is_floating_point():
        raise ValueError(
            f"The table '{name}' must have a floating-point dtype, "
            f"but has {group.weight.dtype} instead. {skip(name)}"
        )
    for module in group.embeddings:
        if not isinstance(module, nn.Embedding):
            continue
        expected = (module.num_embeddings, module.embedding_dim)
        if shape != expected:
            raise ValueError(
                f"The table '{name}' must be whole, with a weight of the shape {expected}, but it "
                f"has {shape} instead. Shard it before another tool slices or "
                "partitions it (AutoTP, `deepspeed.zero.Init`)."
            )


def check_shardable(group: TableGroup, shape: tuple[int, ...]) -> None:
    """
    :param shape: as in :func:`check_weight`.
    :raises ValueError: the table has options, a dtype or ties that sharding would lose.
    :raises TypeError: its class overrides ``forward``, which would be lost.
    """
    check_weight(group, shape)
    name = group.names[0]
    for module, places in group.embeddings.items():
        _check_embedding(module, _names(places)[0])
    for module, places in (*group.embeddings.items(), *group.heads.items()):
        _check_state(module, _names(places)[0])
    if group.others:
        raise ValueError(
            f"The table '{name}' must be shared with embeddings and `torch.nn.Linear` heads only, "
            f"but {' and '.join(group.others)} is the same Parameter, and the tie would break. "
            f"{skip(name)}"
        )


def _check_embedding(module: Module, name: str) -> None:
    if not name:
        raise ValueError(
            "`model` must contain its tables, but is a table itself. Use "
            "`ShardedEmbedding.from_embedding()` or `VocabShardedEmbedding.from_embedding()`."
        )
    if isinstance(module, StandardEmbedding):
        return
    assert isinstance(module, nn.Embedding)
    if not _runs(module, nn.Embedding.forward) and not _only_scales(module):
        raise TypeError(
            f"The table '{name}' must be a `torch.nn.Embedding`, or one that multiplies its output "
            f"by its `embed_scale`, but is a `{type(module).__name__}` with a `forward` of its own "
            f"instead, which a sharded table would not run. {skip(name)}"
        )
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            raise ValueError(
                f"The table '{name}' must not use `{option}`, which sharded tables do not "
                f"support, but it is {getattr(module, option)} instead. {skip(name)}"
            )


def _check_state(module: Module, name: str) -> None:
    """Checks that sharding would lose no state of ``module``."""
    if any(getattr(module, hooks) for hooks in _STATE_DICT_HOOKS):
        raise ValueError(
            f"The table '{name}' must not have state dict hooks, which expect the whole table, but "
            f"has some. Remove them first. {skip(name)}"
        )
    others = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    others -= module._non_persistent_buffers_set  # Such as `embed_scale`.
    if others:
        raise ValueError(
            f"The table '{name}' must have no Parameters, buffers or modules but its weight, since "
            f"sharding would lose them, but has {sorted(others)}. {skip(name)}"
        )


def is_plain_head(module: Module) -> TypeGuard[nn.Linear]:
    """Returns whether ``module`` is a ``nn.Linear`` with the ``forward`` and ``weight`` of one."""
    return (
        isinstance(module, nn.Linear)
        and _runs(module, nn.Linear.forward)
        and "weight" in module._parameters
    )


def output_scale(module: nn.Embedding) -> float | Tensor | None:
    """Returns the factor of a scaled embedding, as in Gemma 3 or BART, or ``None``."""
    if _runs(module, nn.Embedding.forward):
        return None
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor) and scale.is_meta:
        scale = getattr(module, "scalar_embed_scale", None)  # Gemma 3 makes `embed_scale` of it.
        return None if scale is None else torch.tensor(scale, device="cpu")
    if isinstance(scale, Tensor) and not isinstance(scale, Parameter):
        return scale.detach().cpu()
    return scale if isinstance(scale, (float, int)) else None


# The only names that the `forward` of a scaled embedding may use.
_SCALING_NAMES = {"super", "forward", "embed_scale", "to", "weight", "dtype"}


def _only_scales(module: nn.Embedding) -> bool:
    """Returns whether ``module`` runs ``nn.Embedding.forward`` times ``embed_scale``. Inspects the
    names its code uses, then tries it on a small table."""
    forward, scale = type(module).forward, output_scale(module)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if scale is None or code is None or "forward" in vars(module):
        return False
    has_numbers = any(isinstance(constant, (int, float)) for constant in code.co_consts)
    names = {*code.co_names, *code.co_freevars} - {"__class__"}
    if has_numbers or not names <= _SCALING_NAMES:
        return False
    small = copy.copy(module)
    weight = torch.linspace(-3.0, 3.0, 6, device="cpu", dtype=module.weight.dtype).view(2, 3)
    ids = torch.tensor([[1, 0], [1, 1]], device="cpu")
    small.__dict__ |= {"_parameters": {"weight": Parameter(weight)}, "padding_idx": None}
    if "embed_scale" in module._buffers:
        small._buffers = {"embed_scale": scale}  # type: ignore[dict-item]
    factor = scale.to(weight.dtype) if isinstance(scale, Tensor) else scale
    return torch.equal(forward(small, ids), weight[ids] * factor)


def skip(name: str) -> str:
    """Returns the end of an error: how to leave the table ``name`` as it is."""
    return f"Leave it as it is with `rules={{{name!r}: 'none'}}` and no `init_fn`."
