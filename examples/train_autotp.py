"""Trains with DeepSpeed and AutoTP.

    deepspeed --num_gpus 2 --no_local_rank examples/train_autotp.py

The lines that shard its table end in `# added`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed.integrations.deepspeed import initialize  # added

VOCAB_SIZE, STEPS = 101, 4

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {"autotp_size": 2},
    "tp_embed": {"strategy": "vocab", "shard_logits": True},  # added
}


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batches() -> list[Tensor]:
    """Returns the same batches on all ranks of a tensor-parallel group, as AutoTP needs."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (2, 16), generator=generator) for _ in range(STEPS)]


def main() -> None:
    engine, *_ = initialize(model=build_model(), config=CONFIG)  # added
    print(engine.tp_embed_report)  # added
    for step, ids in enumerate(batches(), start=1):
        ids = ids.to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.8f}")


if __name__ == "__main__":
    main()
