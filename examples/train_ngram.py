"""Trains a small language model with a table of hashed n-grams, and the same model without it.

    deepspeed --num_gpus 2 --no_local_rank examples/train_ngram.py

Takes two minutes on two cores. The ranks have batches of their own, and each holds a part of the
rows of the table, which has an optimizer of its own. Prints the losses on text that was not trained
on, and writes a chart of them.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from corpus import Corpus, load
from tp_embed import NGramEmbedding, NGramGate, XorHash
from tp_embed.integrations.deepspeed import initialize
from tp_embed.monitor.charts import line_charts, save
from tp_embed.nn.init import normal

BATCH, LENGTH, HIDDEN, EMBED, RATE = 8, 128, 96, 24, 3e-3

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": RATE, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}
TABLE: dict[str, Any] = {
    "rules": {"ngram.*": "world"},
    "placement": "cyclic",
    "tables": {"ngram.*": {"optimizer": "rowwise_adagrad", "lr": 0.05}},
}


class LanguageModel(nn.Module):
    """A small Llama, with n-grams up to three tokens or without."""

    def __init__(self, vocab_size: int, end: int, rows: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_cache=False,
        )
        self.llama = LlamaForCausalLM(config)
        self.ngram: NGramGate | None = None
        if rows:
            hashing = XorHash(vocab_size, rows, heads=2, boundary=end)
            # Small values, since most n-grams of a new text have a row that has not been trained.
            table = NGramEmbedding(hashing, EMBED, init_fn=partial(normal, std=0.02))
            self.ngram = NGramGate(table, HIDDEN)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.llama.get_input_embeddings()(input_ids)
        if self.ngram is not None:
            x = self.ngram(x, input_ids)
        return self.llama(inputs_embeds=x, labels=labels)


def train(corpus: Corpus, end: int, rows: int, steps: int) -> tuple[list[int], list[float]]:
    """Trains from the same initial values on the same batches, with a table or without.

    :param rows: the rows of each of the four heads of the table; 0 for no table.
    :returns: the steps at which there was a validation, and their losses.
    """
    torch.manual_seed(0)
    model = LanguageModel(corpus.vocab_size, end, rows)
    rates = {"warmup_max_lr": RATE, "warmup_type": "linear"}
    lengths = {"warmup_num_steps": max(2, steps // 10), "total_num_steps": steps + 1}
    scheduler = {"type": "WarmupDecayLR", "params": {**rates, **lengths}}
    section = {"tp_embed": TABLE} if rows else {}
    engine, *_ = initialize(model=model, config={**CONFIG, "scheduler": scheduler, **section})
    name = f"with {4 * rows} rows" if rows else "without the table"
    every, at, losses, started = max(1, steps // 10), [], [], time.perf_counter()
    for step in range(1, steps + 1):
        ids = corpus.batch(step, BATCH, LENGTH, seed=0, rank=dist.get_rank()).to(engine.device)
        engine.train()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        if step % every == 0:
            at.append(step)
            losses.append(corpus.validation_loss(engine, 8, BATCH, LENGTH))
            if dist.get_rank() == 0:
                seconds = time.perf_counter() - started
                print(f"{name}: step {step}, validation loss {losses[-1]:.4f}, {seconds:.0f} s")
    return at, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=100_000, help="of each head of the table")
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--max-bytes", type=int, default=8_000_000, help="of text")
    parser.add_argument("--cache", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--chart", type=Path, default=Path("runs/ngram.svg"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # One process per core.
    deepspeed.init_distributed()
    if dist.get_rank() == 0:
        load(args.cache, args.vocab_size, args.max_bytes)
    dist.barrier()
    corpus = load(args.cache, args.vocab_size, args.max_bytes)
    end = 0  # The id of the end of a text.
    curves = {
        "without the table": train(corpus, end, 0, args.steps),
        "with the table": train(corpus, end, args.rows, args.steps),
    }
    if dist.get_rank() == 0:
        lines = [(name, at, losses) for name, (at, losses) in curves.items()]
        args.chart.parent.mkdir(parents=True, exist_ok=True)
        save(line_charts({"Validation loss": lines}), args.chart)
        print(f"The chart is in {args.chart}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
