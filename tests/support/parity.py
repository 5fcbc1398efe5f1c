"""The parity harness: records the behaviour of a table, sharded or not, as comparable data.

`run` trains a table on every rank of a gang and returns all observations; `reference` does the same
with `torch.nn.Embedding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tp_embed import (
    BatchLayout,
    Partition,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)

SHARDED = {"embed": ShardedEmbedding, "vocab": VocabShardedEmbedding}


@dataclass(frozen=True)
class Case:
    """A table, the ids of each step, and options of training."""

    num_embeddings: int
    embed_dim: int
    shape: tuple[int, ...] = (3, 4)
    pad_idx: int | None = None
    dtype: torch.dtype = torch.float32
    id_dtype: torch.dtype = torch.int64
    sparse: bool = False
    nan_row: int | None = None
    output: str = "replicated"
    dedup: Any = "auto"
    reuse_grad: bool = False
    seq_lens: tuple[int, ...] | None = None  # The lengths of a batch's rows; the rest is padding.
    seed: int = 0
    steps: int = 5

    def table(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        table = torch.randn(self.num_embeddings, self.embed_dim, generator=generator)
        table[0, 0] = -0.0  # A sum with 0.0 would lose its sign.
        if self.nan_row is not None:
            table[self.nan_row] = torch.nan
        return table.to(self.dtype)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Returns (ids, gradient of the output) for each step."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        batches = []
        for _ in range(self.steps):
            ids = torch.randint(self.num_embeddings, self.shape, generator=generator)
            if self.seq_lens is not None:
                ids[self.padding()] = -7  # It is not read.
            grad = torch.randn(*self.shape, self.embed_dim, generator=generator)
            batches.append((ids.to(self.id_dtype), grad.to(self.dtype)))
        return batches

    def padding(self) -> Tensor:
        lens = torch.tensor(self.seq_lens or [self.shape[-1]] * self.shape[0])
        return torch.arange(self.shape[-1]) >= lens[:, None]

    def layout(self, ids: Tensor) -> BatchLayout | None:
        return None if self.seq_lens is None else BatchLayout.of(ids, self.seq_lens)

    def part(self, rank: int, size: int) -> tuple[Any, ...]:
        """Returns a rank's part of the output, as an index."""
        if self.output == "shard":
            own = Partition(self.embed_dim, size).shard(rank)
            return ..., slice(own.start, own.stop)
        if self.output == "sequence":
            own = Partition(self.shape[-1], size).shard(rank)
            return ..., slice(own.start, own.stop), slice(None)
        return (...,)


@dataclass(frozen=True)
class Seen:
    """The observations of a table: outputs and gradients of the weight by step, and the final
    table. All are whole."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    table: Tensor


def _optimizer(parameters: Any, sparse: bool) -> torch.optim.Optimizer:
    if sparse:
        return torch.optim.SparseAdam(list(parameters), lr=0.1)
    return torch.optim.AdamW(parameters, lr=0.1, foreach=False)


def run(gang: Any, kind: str, case: Case) -> Seen:
    """Trains the table of ``case`` over ``gang``; ``kind`` is "embed" or "vocab"."""
    embed = SHARDED[kind].from_embedding(
        _standard(case), gang, output=case.output, dedup=case.dedup
    )
    return _train(embed, case, case.part(gang.rank, gang.size))


def run_standard(case: Case) -> Seen:
    return _train(_standard(case), case, (...,))


def _standard(case: Case) -> StandardEmbedding:
    embed = StandardEmbedding(
        case.num_embeddings,
        case.embed_dim,
        case.pad_idx,
        dtype=case.dtype,
        sparse=case.sparse,
        reuse_grad=case.reuse_grad,
    )
    with torch.no_grad():
        embed.weight.copy_(case.table())
    return embed


def _train(embed: Any, case: Case, part: tuple[Any, ...]) -> Seen:
    optimizer = _optimizer(embed.parameters(), case.sparse)
    outputs, gradients = [], []
    for ids, grad in case.batches():
        optimizer.zero_grad()
        output = embed(ids, case.layout(ids))
        output.backward(grad[part])
        outputs.append(output.detach().clone())
        gradients.append(whole(embed, _dense(embed.weight.grad, case)))
        optimizer.step()
    return Seen(outputs, gradients, whole(embed, embed.weight.detach()))


def _dense(grad: Tensor, case: Case) -> Tensor:
    assert grad.is_sparse == case.sparse
    if not case.sparse:
        return grad
    assert grad.is_coalesced()
    rows = grad.indices()[0]
    assert torch.equal(rows, rows.unique())
    return grad.to_dense()


def whole(embed: Any, block: Tensor) -> Tensor:
    """Gathers ``block``, shaped like the weight of ``embed``, over the gang."""
    if isinstance(embed, StandardEmbedding):
        return block.clone()
    weight, embed.weight = embed.weight, torch.nn.Parameter(block, requires_grad=False)
    table = embed.to_embedding().weight.detach()
    embed.weight = weight
    return table


def reference(case: Case) -> Seen:
    """Trains `torch.nn.Embedding` in the same way."""
    embed = torch.nn.Embedding(
        case.num_embeddings,
        case.embed_dim,
        case.pad_idx,
        sparse=case.sparse,
        _weight=case.table(),
    )
    optimizer = _optimizer(embed.parameters(), case.sparse)
    outputs, gradients = [], []
    for ids, grad in case.batches():
        optimizer.zero_grad()
        ids = ids if ids.dtype == torch.int32 else ids.long()
        if case.seq_lens is None:
            # torch 2.13 fails in the sparse backward of 0-d ids with a `padding_idx`.
            output = embed(ids.view(-1)).view(grad.shape)
            output.backward(grad)
        else:
            rows = embed(ids[~case.padding()])
            rows.backward(grad[~case.padding()])
            output = torch.zeros_like(grad)
            output[~case.padding()] = rows.detach()
        outputs.append(output.detach().clone())
        assert embed.weight.grad is not None
        gradients.append(embed.weight.grad.to_dense())
        if case.sparse:
            # torch sums duplicates in order in `to_dense()`, and in any order in `coalesce()`.
            rows = embed.weight.grad._indices().unique()
            embed.weight.grad = torch.sparse_coo_tensor(
                rows[None], gradients[-1][rows], case.table().shape, check_invariants=True
            ).coalesce()
        optimizer.step()
    return Seen(outputs, gradients, embed.weight.detach())


def bits(tensor: Tensor) -> Tensor:
    """Returns the bits of ``tensor``, so that 0.0 differs from -0.0 and NaN equals NaN."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def assert_same_bits(a: Tensor, b: Tensor, what: str) -> None:
    assert a.shape == b.shape, f"{what}: {a.shape} is not {b.shape}"
    assert a.dtype == b.dtype, f"{what}: {a.dtype} is not {b.dtype}"
    assert torch.equal(bits(a), bits(b)), f"{what} differ by {(a - b).abs().max()}: {a}\n{b}"


def assert_same(seen: Seen, expected: Seen, *, part: tuple[Any, ...] = (...,)) -> None:
    for step, (a, b) in enumerate(zip(seen.outputs, expected.outputs, strict=True)):
        assert_same_bits(a, b[part], f"outputs of step {step}")
    for step, (a, b) in enumerate(zip(seen.gradients, expected.gradients, strict=True)):
        assert_same_bits(a, b, f"gradients of step {step}")
    assert_same_bits(seen.table, expected.table, "tables at the end")
