"""Trains with a Megatron-style model-parallel unit.

    deepspeed --num_gpus 2 --no_local_rank examples/train_mpu.py

The lines that shard its table, and fuse its loss with the head, end in `# added`.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tp_embed.integrations.deepspeed import initialize  # added

VOCAB_SIZE, DIM, STEPS = 101, 32, 4

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "tp_embed": {"strategy": "vocab"},  # added
}


class ModelParallelUnit:
    """Makes neighbouring ranks model-parallel, and ranks with the same model-parallel rank
    data-parallel."""

    def __init__(self, size: int) -> None:
        ranks = torch.arange(dist.get_world_size()).view(-1, size)
        self._model, self._data = self._own_group(ranks), self._own_group(ranks.T)

    @staticmethod
    def _own_group(all_ranks: Tensor) -> Any:
        groups = [(ranks, dist.new_group(ranks)) for ranks in all_ranks.tolist()]
        return next(group for ranks, group in groups if dist.get_rank() in ranks)

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, DIM)
        self.body = nn.GRU(DIM, DIM, batch_first=True)  # Stands for model-parallel layers.
        self.head: Any = nn.Linear(DIM, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.body(self.embed(ids[:, :-1]))
        loss: Tensor = self.head.loss(x, ids[:, 1:])  # added
        return loss


def batches() -> list[Tensor]:
    """Returns the same batches on all ranks of a model-parallel group."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (2, 16), generator=generator) for _ in range(STEPS)]


def main() -> None:
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model, mpu = LanguageModel(), ModelParallelUnit(size=2)
    engine, *_ = initialize(model=model, config=CONFIG, mpu=mpu)  # added
    print(engine.tp_embed_report)  # added
    for step, ids in enumerate(batches(), start=1):
        loss = engine(ids.to(engine.device))
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.8f}")


if __name__ == "__main__":
    main()
