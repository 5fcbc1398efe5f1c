"""Cases of :mod:`compatibility`: reads, hooks and attributes of the weight, norms, state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
    parameters_to_vector,
    vector_to_parameters,
)

import tp_embed
from compatibility import Seen, World, ids, noise


def product(world: World) -> Seen:
    """Multiply by the weight: `F.linear(x, embed.weight)`, as TRL's trainers do"""
    return (functional.linear(noise(2, 5), world.embedding().weight),)


def transposed_product(world: World) -> Seen:
    """Multiply by the transposed weight: `x @ embed.weight.T`"""
    return (noise(2, 5) @ world.embedding().weight.T,)


def einsum(world: World) -> Seen:
    """Multiply by the weight in `torch.einsum`"""
    return (torch.einsum("ne,ve->nv", noise(2, 5), world.embedding().weight),)


def indexing(world: World) -> Seen:
    """Take rows out of the weight: `embed.weight[ids]`"""
    return (world.embedding().weight[ids()],)


def slicing(world: World) -> Seen:
    """Take the first rows, as models do with positions: `embed.weight[:n]`"""
    return (world.embedding().weight[:2],)


def functional_embedding(world: World) -> Seen:
    """Look up by `F.embedding(ids, embed.weight)`"""
    return (functional.embedding(ids(), world.embedding().weight),)


def embedding_bag(world: World) -> Seen:
    """Look up by `F.embedding_bag(ids, embed.weight)`"""
    return (functional.embedding_bag(ids(), world.embedding().weight),)


def broadcast_weight(world: World) -> Seen:
    """Use the whole weight as queries: `embed.weight.unsqueeze(0).expand(...)`"""
    return (world.embedding().weight.unsqueeze(0).expand(2, -1, -1),)


def add_to_weight(world: World) -> Seen:
    """Add the whole weight to activations: `x + positions.weight`"""
    return (noise(2, 7, 5) + world.embedding().weight,)


def concatenated_weight(world: World) -> Seen:
    """Concatenate the weight with other rows: `torch.cat([embed.weight, new])`"""
    return (torch.cat([world.embedding().weight, noise(1, 5)]),)


def norm_of_weight(world: World) -> Seen:
    """Reduce the weight: `embed.weight.norm()`, a penalty"""
    return (world.embedding().weight.norm(),)


def sum_of_squares(world: World) -> Seen:
    """Penalise the weight item by item: `(weight ** 2).sum()`"""
    return ((world.embedding().weight ** 2).sum(),)


def norm_of_gradient(world: World) -> Seen:
    """Reduce the gradient by hand: `weight.grad.norm()`"""
    embed = world.embedding()
    embed(ids()).square().sum().backward()
    return (embed.weight.grad.norm(),)


def numpy_of_weight(world: World) -> Seen:
    """Convert the weight: `embed.weight.detach().numpy()`"""
    return (torch.from_numpy(world.embedding().weight.detach().numpy()),)


def write_a_row(world: World) -> Seen:
    """Write a row: `embed.weight.data[0] = 0`"""
    embed = world.embedding()
    embed.weight.data[0] = 0
    return (world.whole(embed),)


def scale_the_weight(world: World) -> Seen:
    """Change the weight item by item: `embed.weight.data.mul_(2)`"""
    embed = world.embedding()
    embed.weight.data.mul_(2)
    with torch.no_grad():
        embed.weight.add_(1)
    return (world.whole(embed),)


def initialise_the_weight(world: World) -> Seen:
    """Initialise the weight: `nn.init.normal_(embed.weight, std=0)`"""
    embed = world.embedding()
    nn.init.normal_(embed.weight, mean=1.0, std=0.0)
    return (world.whole(embed),)


def xavier(world: World) -> Seen:
    """Initialise the weight by its shape: `nn.init.xavier_uniform_(embed.weight)`"""
    embed = world.embedding()
    torch.manual_seed(0)
    nn.init.xavier_uniform_(embed.weight)
    return (world.whole(embed),)


def copy_a_whole_table(world: World) -> Seen:
    """Copy a whole table into the weight: `embed.weight.data.copy_(table)`"""
    embed = world.embedding()
    embed.weight.data.copy_(noise(7, 5, seed=2))
    return (world.whole(embed),)


def clip_by_torch(world: World) -> Seen:
    """Clip by `torch.nn.utils.clip_grad_norm_`"""
    model = world.model()
    model.loss(ids()).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    return norm, world.whole(model.embed, model.embed.weight.grad), model.mix.weight.grad


def clip_by_tp_embed(world: World) -> Seen:
    """Clip by `tp_embed.clip_grad_norm_`"""
    model = world.model()
    model.loss(ids()).backward()
    clip = clip_grad_norm_ if world.is_torch else tp_embed.clip_grad_norm_
    norm = clip(model.parameters(), 0.1)
    return norm, world.whole(model.embed, model.embed.weight.grad), model.mix.weight.grad


def total_norm_by_torch(world: World) -> Seen:
    """Take `torch.nn.utils.get_total_norm` of gradients"""
    model = world.model()
    model.loss(ids()).backward()
    return (get_total_norm([p.grad for p in model.parameters()]),)


def clip_values(world: World) -> Seen:
    """Clip values: `clip_grad_value_`"""
    model = world.model()
    model.loss(ids()).backward()
    clip_grad_value_(model.parameters(), 0.05)
    return (world.whole(model.embed, model.embed.weight.grad),)


def vectors(world: World) -> Seen:
    """Convert to a vector and back: `parameters_to_vector`, `vector_to_parameters`"""
    model = world.model()
    vector_to_parameters(2 * parameters_to_vector(model.parameters()), model.parameters())
    return (world.whole(model.embed),)


def norm_of_a_vector(world: World) -> Seen:
    """Take the norm of a vector of Parameters: `parameters_to_vector(...).norm()`"""
    return (parameters_to_vector(world.model().parameters()).norm(),)


def penalty_on_a_flat_weight(world: World) -> Seen:
    """Penalize the flat weight: `(embed.weight.view(-1) ** 2).mean()`"""
    embed = world.embedding()
    penalty = (embed.weight.view(-1) ** 2).mean()
    penalty.backward()
    return penalty, world.whole(embed, embed.weight.grad)


def elementwise_hook_before(world: World) -> Seen:
    """Hook the weight before it is sharded: `weight.register_hook(lambda g: g * 2)`"""
    model = world.plain_model()
    model.embed.weight.register_hook(lambda grad: grad * 2)
    world.shard(model)
    model.loss(ids()).backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def mask_before(world: World) -> Seen:
    """Mask rows by a hook of the weight before it is sharded: only new tokens train"""
    model = world.plain_model()
    mask = (torch.arange(7) > 4).float()[:, None]
    model.embed.weight.register_hook(lambda grad: grad * mask)
    world.shard(model)
    model.loss(ids()).backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def mask_after(world: World) -> Seen:
    """Mask rows by a hook of the weight after it was sharded"""
    mask = (torch.arange(7) > 4).float()[:, None]
    return _hooked(world, lambda grad: grad * mask)


def _hooked(world: World, hook: Callable[[Tensor], Tensor]) -> Seen:
    model = world.plain_model()
    world.shard(model)
    model.embed.weight.register_hook(hook)
    model.loss(ids()).backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def elementwise_hook_after(world: World) -> Seen:
    """Hook the weight after it was sharded: `weight.register_hook(lambda g: g.clamp(-1, 1))`"""
    return _hooked(world, lambda grad: grad.clamp(-0.01, 0.01))


def norm_in_a_hook(world: World) -> Seen:
    """Normalise the gradient in a hook of the weight after it was sharded: `g / g.norm()`"""
    return _hooked(world, lambda grad: grad / grad.norm())


def row_in_a_hook(world: World) -> Seen:
    """Clear a row of the gradient in a hook of the weight after it was sharded: `g[1] = 0`"""
    return _hooked(world, lambda grad: grad.index_fill(0, torch.tensor([1]), 0))


def step_in_a_hook(world: World) -> Seen:
    """Step in `register_post_accumulate_grad_hook` of the weight, before it is sharded"""
    model, seen = world.plain_model(), []
    model.embed.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    world.shard(model)
    model.loss(ids()).backward()
    return tuple(world.whole(model.embed, grad) for grad in seen)


def attributes_of_the_weight(world: World) -> Seen:
    """Set attributes of the weight: `weight.no_weight_decay = True`"""
    model = world.plain_model()
    model.embed.weight.no_weight_decay = True
    world.shard(model)
    return (torch.tensor(model.embed.weight.no_weight_decay),)


def frozen(world: World) -> Seen:
    """Freeze the weight: `requires_grad_(False)`"""
    model = world.plain_model()
    model.embed.weight.requires_grad_(False)
    world.shard(model)
    model.loss(ids()).backward()
    return (torch.tensor(model.embed.weight.grad is None), model.mix.weight.grad)


def names_of_torch(world: World) -> Seen:
    """Read `embedding_dim`, `padding_idx`, `in_features`, `out_features` of the modules"""
    model = world.plain_model()
    world.shard(model)
    sizes = [model.embed.embedding_dim, model.head.in_features, model.head.out_features]
    return torch.tensor(sizes), torch.tensor(model.embed.padding_idx is None)


def deep_copies(world: World) -> Seen:
    """Copy a model: `copy.deepcopy`"""
    model = copy.deepcopy(world.model())
    model.loss(ids()).backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def pickled(world: World) -> Seen:
    """Pickle a model: `pickle`, `torch.save(model)`"""
    model = pickle.loads(pickle.dumps(world.model()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    model.loss(ids()).backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def state_dict_round_trip(world: World) -> Seen:
    """Save and load on the same ranks: `state_dict`, `torch.save`, `load_state_dict`"""
    model, file = world.model(), io.BytesIO()
    with torch.no_grad():
        model.embed.weight.mul_(3)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = world.model()
    other.load_state_dict(torch.load(file))
    return (world.whole(other.embed),)


def assigned_state_dict(world: World) -> Seen:
    """Load by `load_state_dict(assign=True)`"""
    model, other = world.model(), world.model()
    with torch.no_grad():
        model.embed.weight.mul_(3)
    other.load_state_dict(model.state_dict(), assign=True)
    other.head.weight = other.embed.weight
    other.loss(ids()).backward()
    return world.whole(other.embed), world.whole(other.embed, other.embed.weight.grad)


def whole_state_dict(world: World) -> Seen:
    """Load the state dict of a whole model without `hook_state_dict`"""
    model = world.model()
    model.load_state_dict(world.plain_model().state_dict())
    return (world.whole(model.embed),)


def other_dtypes(world: World) -> Seen:
    """Convert a model: `model.double()`, `model.to(torch.bfloat16)`"""
    model = world.model().double()
    model.loss(ids()).backward()
    grad = world.whole(model.embed, model.embed.weight.grad)
    return grad, world.whole(model.to(torch.bfloat16).embed)


def other_integers(world: World) -> Seen:
    """Look up int32, non-contiguous, empty and scalar ids"""
    embed = world.embedding()
    several = ids().int(), ids().T, ids()[:, :0], ids()[0, 0], ids()[:, ::2]
    return tuple(embed(x) for x in several)


def ids_out_of_range(world: World) -> Seen:
    """Look up ids out of range, negative ids, floats"""
    found = []
    for x in (ids() + 3, ids() - 3, ids().float()):
        try:
            found.append(world.embedding()(x))
        except (IndexError, TypeError, RuntimeError):
            found.append(torch.zeros(()))
    return tuple(found)
