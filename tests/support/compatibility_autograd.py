"""Cases of :mod:`compatibility`: outputs, gradients, hooks and transforms."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compatibility import Seen, World, ids, noise


def output_in_place(world: World) -> Seen:
    """Change the output in place: `x *= s`, `x += positions`, `x[mask] = images`"""
    embed = world.embedding()
    x = embed(ids())
    x *= 2
    x += noise(*x.shape)
    x[0, 1:] = 0.5
    functional.relu(x, inplace=True)
    x.square().sum().backward()
    return x, world.whole(embed, embed.weight.grad)


def logits_in_place(world: World) -> Seen:
    """Change logits in place: `logits /= temperature`, `logits[mask] = -inf`"""
    model = world.model()
    logits = model(ids())
    logits /= 3
    logits[..., 2] = -1e9
    functional.cross_entropy(logits.flatten(0, 1), torch.ones(8, dtype=torch.long)).backward()
    return logits, world.whole(model.embed, model.embed.weight.grad)


def ids_in_place(world: World) -> Seen:
    """Change ids in place before the backward"""
    embed, x = world.embedding(), ids()
    output = embed(x)
    x.fill_(0)
    output.sum().backward()
    return (world.whole(embed, embed.weight.grad),)


def second_backward(world: World) -> Seen:
    """Call `backward()` twice without `retain_graph`"""
    embed = world.embedding()
    loss = embed(ids()).sum()
    loss.backward()
    loss.backward()
    return (world.whole(embed, embed.weight.grad),)


def retained_graph(world: World) -> Seen:
    """Call `backward(retain_graph=True)` twice, and accumulate gradients"""
    model = world.model()
    loss = model.loss(ids())
    loss.backward(retain_graph=True)
    loss.backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def autograd_grad(world: World) -> Seen:
    """Take `torch.autograd.grad(loss, embed.weight)`"""
    embed = world.embedding()
    (grad,) = torch.autograd.grad(embed(ids()).square().sum(), embed.weight)
    return (world.whole(embed, grad),)


def second_derivatives(world: World) -> Seen:
    """Take second derivatives by `create_graph=True`: Hessian products, gradient penalties"""
    embed, mix = world.embedding(), nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        mix.weight.copy_(noise(1, 5))
    loss = mix(embed(ids())).tanh().sum()
    (grad,) = torch.autograd.grad(loss, mix.weight, create_graph=True)
    found = torch.autograd.grad(grad.square().sum(), [embed.weight, mix.weight])
    return world.whole(embed, found[0]), found[1]


def penalty_on_the_gradient_of_the_table(world: World) -> Seen:
    """Take the second derivative through the gradient of the weight itself"""
    embed, mix = world.embedding(), nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        mix.weight.copy_(noise(1, 5))
    (grad,) = torch.autograd.grad(mix(embed(ids())).tanh().sum(), embed.weight, create_graph=True)
    factors = noise(7, 5, seed=7)
    if not world.is_torch and world.kind != "standard":
        rows, columns = embed.rows, embed.columns
        factors = factors[rows.start : rows.stop, columns.start : columns.stop]
    found = torch.autograd.grad((grad * factors).sum(), [embed.weight])
    return (world.whole(embed, found[0]),)


def second_derivatives_of_the_head(world: World) -> Seen:
    """Take second derivatives through the logits of a tied head"""
    model = world.model()
    (grad,) = torch.autograd.grad(model.loss(ids()), model.mix.weight, create_graph=True)
    found = torch.autograd.grad(grad.square().sum(), [model.embed.weight, model.mix.weight])
    return world.whole(model.embed, found[0]), found[1]


def second_derivatives_by_backward(world: World) -> Seen:
    """Take second derivatives by `backward(create_graph=True)`"""
    embed = world.embedding()
    embed(ids()).pow(3).sum().backward(create_graph=True)
    return (world.whole(embed, embed.weight.grad),)


def maml(world: World) -> Seen:
    """Differentiate through a step of SGD by `torch.func.functional_call` (MAML)"""
    model = world.model()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        logits = torch.func.functional_call(model, parameters, (ids(),), tie_weights=True)
        return functional.cross_entropy(logits.flatten(0, 1), ids().flatten())

    grads = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
    stepped = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    found = torch.autograd.grad(loss(stepped), list(parameters.values()))
    return world.whole(model.embed, found[0]), found[1], found[2]


def functional_call(world: World) -> Seen:
    """Call the layer by `torch.func.functional_call` with `2 * weight`"""
    embed = world.embedding()
    output = torch.func.functional_call(embed, {"weight": embed.weight * 2}, (ids(),))
    output.square().sum().backward()
    return output, world.whole(embed, embed.weight.grad)


def func_grad(world: World) -> Seen:
    """Take `torch.func.grad` by the weight"""
    embed = world.embedding()

    def loss(weight):
        return torch.func.functional_call(embed, {"weight": weight}, (ids(),)).square().sum()

    return (world.whole(embed, torch.func.grad(loss)(embed.weight.detach())),)


def func_vjp(world: World) -> Seen:
    """Take `torch.func.vjp` by the weight"""
    embed = world.embedding()

    def rows(weight):
        return torch.func.functional_call(embed, {"weight": weight}, (ids(),))

    output, back = torch.func.vjp(rows, embed.weight.detach())
    return output, world.whole(embed, back(noise(2, 4, 5))[0])


def func_jvp(world: World) -> Seen:
    """Take `torch.func.jvp` by the weight"""
    embed = world.embedding()

    def rows(weight):
        return torch.func.functional_call(embed, {"weight": weight}, (ids(),))

    weight = embed.weight.detach()
    return torch.func.jvp(rows, (weight,), (weight * 2,))


def forward_mode(world: World) -> Seen:
    """Use forward-mode AD: `torch.autograd.forward_ad.make_dual`"""
    embed = world.embedding()
    with forward_ad.dual_level():
        weight = embed.weight.detach()
        dual = forward_ad.make_dual(weight, weight * 3)
        output = torch.func.functional_call(embed, {"weight": dual}, (ids(),))
        unpacked = forward_ad.unpack_dual(output)
        return unpacked.primal, unpacked.tangent


def vmap_over_ids(world: World) -> Seen:
    """Map over ids: `torch.vmap(embed)(ids)`"""
    return (torch.vmap(world.embedding())(ids()),)


def vmap_over_tables(world: World) -> Seen:
    """Map over an ensemble: `torch.func.stack_module_state`, `vmap`"""
    embeds = [world.embedding(), world.embedding()]
    weights, _ = torch.func.stack_module_state(embeds)

    def rows(weights):
        return torch.func.functional_call(embeds[0], weights, (ids(),))

    return (torch.vmap(rows)(weights),)


def per_sample_gradients(world: World) -> Seen:
    """Take gradients per sample: `vmap(grad(loss))`"""
    embed = world.embedding()

    def loss(weight, x):
        return torch.func.functional_call(embed, {"weight": weight}, (x,)).square().sum()

    grads = torch.vmap(torch.func.grad(loss), (None, 0))(embed.weight.detach(), ids())
    return tuple(world.whole(embed, grad) for grad in grads)


def hooks_of_outputs(world: World) -> Seen:
    """Hook the output: `register_hook`, `retain_grad`"""
    embed = world.embedding()
    x = embed(ids())
    x.register_hook(lambda grad: grad * 3)
    x.retain_grad()
    x.square().sum().backward()
    return x.grad, world.whole(embed, embed.weight.grad)


def hooks_of_modules(world: World) -> Seen:
    """Hook the module: forward, forward pre, full backward"""
    embed, seen = world.embedding(), []
    embed.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    embed.register_forward_hook(lambda module, args, output: output * 2)
    embed.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    embed(ids()).square().sum().backward()
    return seen[0], world.whole(embed, embed.weight.grad)


def checkpointing(world: World) -> Seen:
    """Recompute activations: `torch.utils.checkpoint`"""
    model = world.model()
    checkpoint(model.loss, ids(), use_reentrant=False).backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def offloaded_activations(world: World) -> Seen:
    """Keep saved tensors elsewhere: `saved_tensors_hooks`, `save_on_cpu`"""
    model, shapes = world.model(), set()

    def pack(tensor):
        shapes.add(tuple(tensor.shape))
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(ids())
    loss.backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def autocast(world: World) -> Seen:
    """Run under `torch.autocast`"""
    model = world.model()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids())
    return (torch.tensor(logits.dtype == torch.bfloat16),)


def without_gradients(world: World) -> Seen:
    """Run under `torch.no_grad()` and `torch.inference_mode()`"""
    model = world.model()
    with torch.no_grad():
        first = model(ids())
    with torch.inference_mode():
        return first, model(ids())


def anomaly_mode(world: World) -> Seen:
    """Run under `torch.autograd.detect_anomaly()`"""
    model = world.model()
    with torch.autograd.detect_anomaly():
        model.loss(ids()).backward()
    return (world.whole(model.embed, model.embed.weight.grad),)


def label_smoothing(world: World) -> Seen:
    """Take `cross_entropy(logits, target, label_smoothing=0.1)`, or `head.loss()` with it"""
    model = world.model()
    x = noise(2, 4, 5)
    if isinstance(model.head, nn.Linear):
        logits = model.head(x).flatten(0, 1)
        loss = functional.cross_entropy(logits, ids().flatten(), label_smoothing=0.1)
    else:
        loss = model.head.loss(x, ids(), label_smoothing=0.1)
    loss.backward()
    return loss, world.whole(model.embed, model.embed.weight.grad)
