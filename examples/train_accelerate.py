"""Trains with Accelerate and AutoTP.

    deepspeed --num_gpus 2 --no_local_rank examples/train_accelerate.py OUTPUT_DIR
    accelerate launch --config_file examples/accelerate.yaml examples/train_accelerate.py OUTPUT_DIR

The lines that shard its table end in `# added`. Saves its state after two steps and resumes from
it, and saves the whole model at the end.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed.integrations.transformers import prepare  # added

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


def main(output_dir: str) -> None:
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # `Accelerator(cpu=True)` would not use DeepSpeed.
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG))
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = prepare(accelerator, model, optimizer, batches())  # added
    accelerator.print(model.tp_embed_report)  # added

    def train(first: int) -> None:
        for step, ids in enumerate(loader, start=1):
            if step < first:
                continue
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.print(f"step {step}: loss {loss.item():.8f}")
            if step == 2:
                accelerator.save_state(f"{output_dir}/state")

    train(first=1)
    accelerator.load_state(f"{output_dir}/state")
    train(first=3)

    accelerator.unwrap_model(model).save_pretrained(
        f"{output_dir}/model",
        state_dict=accelerator.get_state_dict(model),
        is_main_process=accelerator.is_main_process,
    )


if __name__ == "__main__":
    main(sys.argv[1])
