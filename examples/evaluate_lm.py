"""Computes the validation loss of a model that `train_lm.py` wrote, by plain transformers.

python examples/evaluate_lm.py runs/train_lm
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from corpus import load


def main(run_dir: Path) -> None:
    config = OmegaConf.load(run_dir / "config.yaml")
    data = config.data
    corpus = load(Path(data.cache_dir), data.vocab_size, data.max_bytes)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    loss = corpus.validation_loss(model, config.eval_batches, data.batch_size, data.seq_len)
    trained = json.loads((run_dir / "result.json").read_text())["validation_loss"]
    print(
        f"validation loss {loss:.6f} by transformers, {trained:.6f} by the engine that trained it"
    )
    if abs(loss - trained) > 1e-4 * trained:
        sys.exit("the exported model is not the one that was trained")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
