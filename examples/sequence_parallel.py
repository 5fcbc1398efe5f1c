"""Sequence parallelism (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models", 2022): between its tensor-parallel layers, each rank holds a part of the positions.

    deepspeed --num_gpus 2 --no_local_rank examples/sequence_parallel.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from tp_embed import Gang, Partition
from tp_embed.gang.collectives import copy_to_gang, gather_positions, reduce_positions
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize

VOCAB_SIZE, DIM, HEADS, LENGTH, STEPS = 101, 32, 4, 15, 4

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    # Each rank gets the embeddings of its positions, and passes their hidden states to the head.
    "tp_embed": {"strategy": "vocab", "output": "sequence", "head_input": "sequence"},
}


class SequenceNorm(nn.LayerNorm):
    """Normalizes the positions of this rank, and sums the gradients of its weights over the gang.
    All replicated weights between two tensor-parallel layers need this, biases as well."""

    def __init__(self, dim: int, gang: Gang) -> None:
        super().__init__(dim)
        self.gang = gang

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = copy_to_gang(self.weight, self.gang), copy_to_gang(self.bias, self.gang)
        return layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ParallelAttention(nn.Module):
    """Computes some heads on each rank. Input and output are the positions of this rank."""

    def __init__(self, dim: int, heads: int, gang: Gang) -> None:
        super().__init__()
        self.gang, self.width = gang, dim // heads
        whole = nn.Linear(dim, 3 * dim).weight.detach().view(3, heads, -1, dim)
        self.qkv = self._own(whole.chunk(gang.size, dim=1)[gang.rank].flatten(0, 2), dim=0)
        whole = nn.Linear(dim, dim).weight.detach()
        self.out = self._own(whole.chunk(gang.size, dim=1)[gang.rank].clone(), dim=1)

    @staticmethod
    def _own(shard: Tensor, dim: int) -> nn.Parameter:
        weight: Any = nn.Parameter(shard)
        # Megatron's marks, for the gradient norm and for checkpoints.
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1
        return weight  # type: ignore[no-any-return]

    def forward(self, x: Tensor, length: int) -> Tensor:
        positions = Partition(length, self.gang.size)
        x = gather_positions(x, self.gang, positions)
        q, k, v = linear(x, self.qkv).unflatten(-1, (3, -1, self.width)).permute(2, 0, 3, 1, 4)
        x = scaled_dot_product_attention(q, k, v, is_causal=True)
        partial = linear(x.transpose(1, 2).flatten(2), self.out)
        return reduce_positions(partial, self.gang, positions)


class LanguageModel(nn.Module):
    def __init__(self, gang: Gang) -> None:
        super().__init__()
        self.gang = gang
        self.embed = nn.Embedding(VOCAB_SIZE, DIM)
        self.norm = SequenceNorm(DIM, gang)
        self.attention = ParallelAttention(DIM, HEADS, gang)
        self.last_norm = SequenceNorm(DIM, gang)
        self.head: Any = nn.Linear(DIM, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight

    def hidden(self, ids: Tensor) -> Tensor:
        length = ids.size(1)
        x = self.embed(ids)  # The positions of this rank.
        x = x + self.attention(self.norm(x), length)
        hidden: Tensor = self.last_norm(x)
        return hidden

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.head.loss(self.hidden(ids[:, :-1]), ids[:, 1:])
        return loss


def batches() -> list[Tensor]:
    """Returns the same batches on all ranks of a gang."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (2, LENGTH + 1), generator=generator) for _ in range(STEPS)]


def main() -> None:
    gang = DeepSpeedGang.from_groups(tp_size=2)
    torch.manual_seed(0)
    engine, *_ = initialize(model=LanguageModel(gang), config=CONFIG, mpu=groups)
    print(engine.tp_embed_report)
    for step, ids in enumerate(batches(), start=1):
        loss = engine(ids.to(engine.device))
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.8f}")


if __name__ == "__main__":
    main()
