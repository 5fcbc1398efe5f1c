"""Measures how often tokens of real text repeat, and how unevenly they load a cut vocabulary.

    python benchmarks/bpe_load.py                # a BPE of 32768 on Python's sources: some minutes
    python benchmarks/bpe_load.py --bytes 8e6 --vocab-size 8192
    python benchmarks/bpe_load.py --markdown docs/performance.md   # writes the table there

Trains a byte-level BPE (Sennrich et al., 2016) on the Python sources of the standard library and
installed packages, and draws batches of consecutive tokens from unseen text. A batch has U distinct
ids, and rank p of P owns U_p of them, in the p-th block of the vocabulary. A tokenizer numbers its
merges by frequency, so the first block has more. The table shows the rows, of E items each, that
the busiest rank sends:

- direct: the owner sends its rows to all others, (P-1) max U_p;
- spread: rows go first to ranks with fewer, then to all, at most (P-1)/P max U_p + (P-1) ceil(U/P),
  which is less from three ranks on;
- cut by columns: U rows of E/P columns to all others, (P-1)/P U, on every rank;
- all-reduce of the embeddings of all N tokens, 2 (P-1)/P N.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from statistics import mean

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from pages import insert
from tp_embed.partition import Partition

BEGIN, END = "<!-- The table of benchmarks/bpe_load.py: -->", "<!-- End of the table. -->"

SIZES = (2, 4, 8)


def sources(max_bytes: float) -> list[Path]:
    """Returns Python files, some of every package, with ``max_bytes`` in total."""
    paths = sysconfig.get_paths()
    files = sorted({p for root in ("stdlib", "purelib") for p in Path(paths[root]).rglob("*.py")})
    total = sum(file.stat().st_size for file in files)
    return files[:: max(1, round(total / max_bytes))]


def train(files: list[Path], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(text, files), trainer)
    return tokenizer


def text(file: Path) -> str:
    return file.read_text(errors="replace")


def batches(ids: Tensor, num_tokens: int, most: int) -> Iterator[Tensor]:
    """Yields the distinct ids of batches of consecutive tokens, spread evenly over the text."""
    whole = ids[: len(ids) // num_tokens * num_tokens].view(-1, num_tokens)
    for batch in whole[:: max(1, len(whole) // most)][:most]:
        yield batch.unique()


def rows_sent(distinct: Tensor, num_tokens: int, vocab_size: int, size: int) -> dict[str, float]:
    """Returns the rows that the busiest of ``size`` ranks sends, and its share of distinct ids."""
    count = len(distinct)
    blocks = Partition(vocab_size, size)
    bounds = torch.tensor([blocks.shard(rank).start for rank in range(1, size)])
    largest = int(torch.bucketize(distinct, bounds, right=True).bincount(minlength=size).max())
    others = size - 1
    return {
        "share": largest / count,
        "direct": others * largest,
        "spread": others / size * largest + others * ceil(count / size),
        "columns": others / size * count,
        "all-reduce": 2 * others / size * num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--bytes", type=float, default=32e6, help="size of the text, about")
    parser.add_argument("--batches", type=int, default=64, help="most batches of each size")
    parser.add_argument("--markdown", type=Path, help="the page to write the table to")
    args = parser.parse_args()

    files = sources(args.bytes)
    held_out = files[::10]  # Source of the batches.
    known = [file for file in files if file not in set(held_out)]
    tokenizer = train(known, args.vocab_size)
    vocab_size = tokenizer.get_vocab_size()
    encoded = tokenizer.encode_batch([text(file) for file in held_out])
    ids = torch.tensor([i for each in encoded for i in each.ids])
    lines = [
        f"A BPE of {vocab_size} on {len(known)} files, and {len(ids)} tokens of others.\n",
        "| N | U/N | P | share of the busiest | direct | spread | by columns | all-reduce |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num_tokens in args.tokens:
        found = list(batches(ids, num_tokens, args.batches))
        unique = mean(len(distinct) for distinct in found) / num_tokens
        for size in SIZES:
            rows = [rows_sent(distinct, num_tokens, vocab_size, size) for distinct in found]
            means = {name: mean(row[name] for row in rows) for name in rows[0]}
            share = means.pop("share")
            sent = " | ".join(f"{value:.0f}" for value in means.values())
            lines.append(f"| {num_tokens} | {unique:.2f} | {size} | {share:.2f} | {sent} |")
    if args.markdown is None:
        print("\n".join(lines))
    else:
        insert(args.markdown, BEGIN, END, "\n".join(lines))


if __name__ == "__main__":
    main()
