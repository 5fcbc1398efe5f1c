"""Real text that comes with Python: the source code of its standard library, as token ids."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 20  # One file of this many is kept for validation.


def find_sources(max_bytes: int | None) -> list[Path]:
    """Returns the standard library's modules, sorted by name, up to ``max_bytes`` in total."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources, total = [], 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or not path.is_file():
            continue
        total += path.stat().st_size
        if max_bytes is not None and total > max_bytes:
            break
        sources.append(path)
    return sources


class Corpus:
    """Token ids of the training and the validation text, memory-mapped.

    :param directory: written by :func:`load`: ``train.npy``, ``validation.npy``, ``meta.json``.
    """

    def __init__(self, directory: Path) -> None:
        self.train = np.load(directory / "train.npy", mmap_mode="r")
        self.validation = np.load(directory / "validation.npy", mmap_mode="r")
        self.vocab_size: int = json.loads((directory / "meta.json").read_text())["vocab_size"]

    def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int, rank: int) -> Tensor:
        """Returns the batch of a step, the same on each call. *Shape:* (batch, seq), int64."""
        generator = np.random.default_rng((seed, step, rank))
        starts = generator.integers(len(self.train) - seq_len, size=batch_size)
        return _rows(self.train, starts, seq_len)

    @torch.no_grad()
    def validation_loss(self, model: Any, count: int, batch_size: int, seq_len: int) -> float:
        """Returns the mean loss of ``model``, a model or an engine, over ``count`` batches spread
        evenly over the validation text."""
        model.eval()
        starts = np.linspace(0, len(self.validation) - seq_len, count * batch_size, dtype=np.int64)
        losses = []
        for batch in starts.reshape(count, batch_size):
            ids = _rows(self.validation, batch, seq_len).to(model.device)
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        return sum(losses) / count


def _rows(tokens: Any, starts: Any, seq_len: int) -> Tensor:
    rows = [tokens[start : start + seq_len] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def load(
    cache: Path, vocab_size: int, max_bytes: int | None, say: Callable[[str], None] = print
) -> Corpus:
    """Loads the text as tokens from ``cache``, or trains a byte-level BPE and encodes the text.

    Moves complete results into place, so an interrupted run leaves nothing that looks complete.

    :param cache: the directory of all corpora; each has its own, with ``tokenizer.json``.
    :param vocab_size: the maximum number of tokens in the BPE vocabulary.
    :param max_bytes: how much of the text to use; ``None`` for all.
    :param say: called with a message before slow steps.
    """
    sources = find_sources(max_bytes)
    key = hashlib.sha256(
        json.dumps(
            [sys.version, vocab_size, [(str(p), p.stat().st_size) for p in sources]]
        ).encode()
    ).hexdigest()[:16]
    target = cache / f"stdlib-{key}"
    if target.is_dir():
        return Corpus(target)

    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources]
    size = sum(map(len, texts))
    say(f"training a BPE of {vocab_size} tokens on {len(texts)} files, {size / 1e6:.1f} MB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))

    say("encoding the text")
    encoded = tokenizer.encode_batch(texts)
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts: dict[str, list[Any]] = {"train": [], "validation": []}
    for index, encoding in enumerate(encoded):
        split = "validation" if index % VALIDATION_SHARE == 0 else "train"
        parts[split].append(np.array([*encoding.ids, end], np.uint32))

    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache))
    tokenizer.save(str(temporary / "tokenizer.json"))
    for split, files in parts.items():
        np.save(temporary / f"{split}.npy", np.concatenate(files))
    (temporary / "meta.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(temporary)  # Another run was faster.
    return Corpus(target)
