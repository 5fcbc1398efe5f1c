"""A script with Accelerate and AutoTP.

    deepspeed --num_gpus 2 --no_local_rank examples/train_accelerate.py

The lines that shard its table end in `# added`.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed import shard_embeddings  # added
from tp_embed.integrations.deepspeed import DeepSpeedGang  # added

VOCAB_SIZE, STEPS = 101, 4

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {"autotp_size": 2},
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


def batches() -> DataLoader[list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCAB_SIZE, (2 * STEPS, 16), generator=generator)
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def main() -> None:
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # With `Accelerator(cpu=True)` it would not use DeepSpeed.
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG))
    model = build_model()
    print(shard_embeddings(model, DeepSpeedGang.from_groups(tp_size=2)))  # added
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    for step, ids in enumerate(loader, start=1):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss.item():.8f}")


if __name__ == "__main__":
    main()
