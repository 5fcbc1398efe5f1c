"""Random programs around a table: users' operations as data to print, shrink and run again.

One :class:`Machine` runs a program on our classes, another one on torch's.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tp_embed
from compatibility import plain
from parity import SHARDED
from tp_embed import OutputHead, Partition, StandardEmbedding
from tp_embed.gang.collectives import gather_table

# The name of a method of the machine, and its arguments.
Op = tuple[str, dict[str, Any]]
Seen = dict[str, Tensor | None]
# torch doesn't look these up; both sides look up copies.
COPIED = torch.uint8, torch.int16


@dataclass(frozen=True)
class Spec:
    """A table, the head tied to it, and their optimizer."""

    kind: str = "embed"  # "standard", "embed" or "vocab".
    rows: int = 5
    dim: int = 3
    pad_idx: int | None = None
    dtype: str = "float32"
    sparse: bool = False
    reuse_grad: bool = False
    scale: float | None = None
    output: str = "replicated"
    dedup: Any = "auto"
    head: str | None = None  # "tied" or "biased".
    optimizer: str = "SGD"

    @property
    def exact(self) -> bool:
        """Whether results must be the same bit for bit."""
        return not (self.head or self.sparse or self.dtype == "bfloat16")

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Program:
    spec: Spec
    size: int
    ops: tuple[Op, ...]

    @property
    def exact(self) -> bool:
        return self.spec.exact and not any(name == "clip" for name, _ in self.ops)


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.25


class ScaledEmbedding(nn.Embedding):
    scale: float | None

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if self.scale is None else output * self.scale


class Model(nn.Module):
    def __init__(self, spec: Spec, gang: Any) -> None:
        super().__init__()
        table = (noise(0, spec.rows, spec.dim) - 0.75).to(spec.torch_dtype)
        size = spec.rows, spec.dim, spec.pad_idx
        self.embed: Any
        if gang is None:
            self.embed = ScaledEmbedding(*size, sparse=spec.sparse, _weight=table)
            self.embed.scale = spec.scale
        else:
            self.embed = StandardEmbedding(
                *size,
                dtype=spec.torch_dtype,
                sparse=spec.sparse,
                reuse_grad=spec.reuse_grad,
                scale=spec.scale,
            )
            with torch.no_grad():
                self.embed.weight.copy_(table)
        if spec.kind != "standard" and gang is not None:
            self.embed = SHARDED[spec.kind].from_embedding(
                self.embed, gang, output=spec.output, dedup=spec.dedup
            )
        self.head: Any = None
        if spec.head:
            bias = nn.Parameter(noise(1, spec.rows).to(spec.torch_dtype))
            if gang is None or spec.kind == "standard":
                self.head = nn.Linear(1, 1, bias=False)
                self.head.weight = self.embed.weight
                self.head.bias = bias if spec.head == "biased" else None
            else:
                self.head = OutputHead(self.embed, bias=bias if spec.head == "biased" else None)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, eps=1e-3),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, eps=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, eps=1e-3, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, eps=1e-3),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.1, eps=1e-3),
}


def make_ids(spec: Spec, shape: tuple[int, ...], dtype: str, layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        ids = torch.randint(spec.rows, shape[::-1], generator=generator)
        return ids.to(getattr(torch, dtype)).permute(*reversed(range(len(shape))))
    ids = torch.randint(spec.rows, (*shape, 2), generator=generator).to(getattr(torch, dtype))
    return ids[..., 0] if layout == "strided" else ids[..., 0].contiguous()


class Machine:
    """Runs the operations of a program; without a gang, on torch's classes. Each returns its
    observations, gathered over the gang."""

    def __init__(self, spec: Spec, gang: Any = None) -> None:
        self.spec, self.gang = spec, gang
        self.model = Model(spec, gang)
        self._optimize()
        self.terms: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.retained: list[Tensor] = []

    def run(self, op: Op) -> Seen:
        name, arguments = op
        seen: Seen = getattr(self, name)(**arguments)
        return seen

    def _optimize(self) -> None:
        self.optimizer = OPTIMIZERS[self.spec.optimizer](self.model.parameters())

    @property
    def weight(self) -> Any:
        return self.model.embed.weight

    def part(self, whole: Tensor) -> Tensor:
        """Returns this rank's part of a tensor shaped like an output."""
        if self.gang is None or self.spec.output == "replicated":
            return whole
        dim = -1 if self.spec.output == "shard" else -2
        own = Partition(whole.size(dim), self.gang.size).shard(self.gang.rank)
        return whole.narrow(dim, own.start, len(own))

    def _whole(self, block: Tensor | None) -> Tensor | None:
        if block is None:
            return None
        block = plain(block).clone()
        if self.gang is None or self.spec.kind == "standard":
            return block
        whole = block.new_empty(self.spec.rows, self.spec.dim)
        embed = self.model.embed
        gather_table(whole, block, embed.shard_dim, self.gang, embed.partition)
        return whole

    def look_up(
        self,
        shape: tuple[int, ...],
        seed: int = 0,
        ids: str = "int64",
        layout: str = "contiguous",
        mode: str = "plain",
        hook: str = "none",
        inplace: str = "none",
        arrives: str = "plain",
    ) -> Seen:
        """Looks up ids, changes the output by ``inplace``, and keeps a term of the next loss, whose
        gradient ``arrives`` in some layout."""
        x = make_ids(self.spec, shape, ids, layout, seed)
        self.ids.append(x)
        if self.gang is None and x.dtype in COPIED:
            x = x.long()
        with _context(mode), _hooked(self.model.embed, hook):
            output = self._forward(x, mode)
        seen: Seen = {"part of the output": output.detach().clone()}
        if mode in ("no_grad", "inference_mode"):
            return seen
        if hook == "tensor" and output.requires_grad:
            output.register_hook(lambda grad: grad * 2)
        if hook == "retained" and output.requires_grad:
            output.retain_grad()
            self.retained.append(output)
        factors = self.part(noise(seed + 1, *shape, self.spec.dim)).to(output.dtype)
        output = in_place(inplace, output, factors)
        if self.model.head is not None:
            output = self.model.head(output)
            factors = noise(seed + 2, *shape, self.spec.rows).to(output.dtype)
            seen["logits"] = output.detach().clone()
            output = in_place(inplace, output, factors)
        self.terms.append(term(arrives, output, factors))
        return seen

    def _forward(self, x: Tensor, mode: str) -> Tensor:
        embed: Any = self.model.embed
        if mode == "checkpoint":
            output = checkpoint(lambda x: embed(x) * 1.5, x, use_reentrant=False)
        elif mode == "functional_call":
            output = torch.func.functional_call(embed, {"weight": embed.weight * 1.5}, (x,))
        elif mode == "functional_call of the same":
            output = torch.func.functional_call(embed, {"weight": embed.weight}, (x,))
        else:
            output = embed(x)
        result: Tensor = output
        return result

    def backward(self, mode: str = "backward") -> Seen:
        """Takes the gradient of all terms since the last call."""
        terms, self.terms = self.terms, []
        batches, self.ids = self.ids, []
        if not terms or not any(term.requires_grad for term in terms):
            return {}
        loss = torch.stack([term.float() for term in terms]).sum()
        seen: Seen = {"loss": loss.detach()} if self.spec.output == "replicated" else {}
        if mode == "autograd.grad":
            (grad,) = torch.autograd.grad(loss, self.weight)
            return {**seen, "grad": self._whole(grad)}
        if mode == "second order" and self.model.head is None:
            (grad,) = torch.autograd.grad(loss, self.weight, create_graph=True)
            grad = grad.to_dense()
            seen["grad"] = self._whole(grad)
            # A linear loss has none; torch cannot reshape it for no ids.
            if not grad.requires_grad or not all(ids.numel() for ids in batches):
                return seen
            (second,) = torch.autograd.grad((grad * grad).sum() / 2, self.weight)
            return {**seen, "second": self._whole(second)}
        if mode == "ids changed":
            for ids in batches:
                if ids.dtype not in COPIED:
                    ids.fill_(0)
        loss.backward(retain_graph=mode == "retained twice")
        if mode in ("retained twice", "twice"):
            loss.backward()
        for i, output in enumerate(self.retained):
            seen[f"part of the retained gradient {i}"] = output.grad
        self.retained = []
        return {**seen, "grad": self._whole(self.weight.grad), **self._of_bias()}

    def _of_bias(self) -> Seen:
        bias = getattr(self.model.head, "bias", None)
        return {} if bias is None else {"bias": bias.detach().clone(), "bias grad": bias.grad}

    def step(self) -> Seen:
        self.terms = []  # torch refuses a backward over a changed weight, or is right.
        self.optimizer.step()
        return {"table": self._whole(self.weight), **self._of_bias()}

    def zero_grad(self, set_to_none: bool = True) -> Seen:
        self.optimizer.zero_grad(set_to_none)
        return {"grad": self._whole(self.weight.grad)}

    def clip(self, by: str = "torch", norm: float = 2.0) -> Seen:
        if self.weight.grad is None or self.weight.grad.is_sparse:
            return {}
        clip: Any = torch.nn.utils.clip_grad_norm_
        if by == "tp_embed" and self.gang is not None:
            clip = getattr(tp_embed, "clip_grad_norm_", clip)
        total = clip(self.model.parameters(), 0.1, norm)
        return {"norm": total.detach(), "grad": self._whole(self.weight.grad)}

    def copy(self, how: str = "deepcopy") -> Seen:
        """Continues with a copy of the model, and a new optimizer."""
        self.terms, self.ids, self.retained = [], [], []
        old = self.model
        if how == "deepcopy":
            self.model = copy.deepcopy(old)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(old))
        else:
            file = io.BytesIO()
            torch.save(old.state_dict(), file)
            file.seek(0)
            self.model = Model(self.spec, self.gang)
            self.model.load_state_dict(torch.load(file), assign=how == "assigned state dict")
            if how == "assigned state dict" and self.model.head is not None:
                self.model.head.weight = self.model.embed.weight
        self._optimize()
        return {"table": self._whole(self.weight), **self._of_bias()}

    def hook_weight(self) -> Seen:
        if self.weight.requires_grad:
            self.weight.register_hook(lambda grad: grad * 2)
        return {}

    def freeze(self, frozen: bool = True) -> Seen:
        self.terms, self.ids, self.retained = [], [], []
        self.weight.requires_grad_(not frozen)
        return {}


def _context(mode: str) -> Any:
    if mode == "no_grad":
        return torch.no_grad()
    if mode == "inference_mode":
        return torch.inference_mode()
    if mode == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def _hooked(embed: Any, hook: str) -> Any:
    if hook == "forward":
        return embed.register_forward_hook(lambda module, args, output: output * 2)
    if hook == "forward pre":
        return embed.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    if hook == "full backward":
        return embed.register_full_backward_hook(lambda module, inputs, outputs: None)
    return nullcontext()


def in_place(name: str, output: Tensor, factors: Tensor) -> Tensor:
    if name == "mul_":
        output.mul_(factors)
    elif name == "+=":
        output += factors
    elif name == "masked":
        output[factors > 0.75] = 0.5
    elif name == "relu_":
        functional.relu(output, inplace=True)
    elif name == "of a view":
        output.view(-1).mul_(2)
    elif name == "copy_":
        output.copy_(factors)
    return output


def term(arrives: str, output: Tensor, factors: Tensor) -> Tensor:
    if arrives == "expanded":
        return output.sum()
    if arrives == "transposed" and output.ndim > 1:
        return (output.transpose(0, 1) * factors.transpose(0, 1).contiguous()).sum()
    if arrives == "every other" and output.ndim > 2:
        return (output[::2] * factors[::2]).sum()
    if arrives == "split" and len(output):
        return torch.stack([(part * 3).sum() for part in output.unbind(0)]).sum()
    if arrives == "squared":
        return (output * output * factors).sum()
    return (output * factors).sum()
