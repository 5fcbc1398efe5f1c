"""Converts a small model with optimizer state between every pair of formats and to other numbers of
ranks, and compares the results bit by bit, to show what each format carries.

    python benchmarks/conversions.py --markdown docs/checkpoints.md   # writes the table there
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tp_embed.checkpoint import Checkpoint, ReadOptions, Request, Rule, convert, differences, read
from tp_embed.checkpoint.choices import FORMATS

BEGIN, END = "<!-- The table of benchmarks/conversions.py: -->\n", "<!-- End of the table. -->"

RULES = ("*embed_tokens.weight=vocab", "up.*=0", "down.weight=1", "*=replicated")
OPTIONS = ReadOptions(rules=tuple(map(Rule.parse, RULES)))


class Model(torch.nn.Module):
    """A table with a tied head, layers of both kinds, a norm, and a buffer."""

    # Divisible by two and three ranks, as Megatron-LM and fairseq2 need.
    VOCAB, EMBED = 24, 12

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(self.VOCAB, self.EMBED)
        self.up = torch.nn.Linear(self.EMBED, 2 * self.EMBED)
        self.down = torch.nn.Linear(2 * self.EMBED, self.EMBED, bias=False)
        self.norm = torch.nn.LayerNorm(self.EMBED)
        self.lm_head = torch.nn.Linear(self.EMBED, self.VOCAB, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("scale", torch.randn(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.down(self.up(self.embed_tokens(ids)).relu())
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]


def save_model(path: Path) -> None:
    """Trains the model for three steps, and saves it as a training script does."""
    torch.manual_seed(0)
    model = Model()
    weights = [p for name, p in model.named_parameters() if p.dim() > 1]
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named.items() if any(p is w for w in weights)]},
        {"params": [(n, p) for n, p in named.items() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(Model.VOCAB, (4, 8))).square().mean().backward()
        optimizer.step()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": 3,
            "buffer_names": ["scale"],
        },
        path,
    )


def carried(expected: Checkpoint, found: Checkpoint) -> str:
    """Names what has arrived, the same bit by bit."""
    found_differences = list(differences(expected, found))
    if [each for each in found_differences if each.key.state == "weight"]:
        return "**weights differ**"
    parts = ["weights"]
    if not found_differences:
        parts = ["all"]
        if expected.optimizer is not None:
            assert found.optimizer is not None
            if found.optimizer.steps != expected.optimizer.steps:
                parts.append("no steps")
            if found.optimizer.groups != expected.optimizer.groups:
                parts.append("other groups")
    if found.ties != expected.ties:
        parts.append("untied")
    if found.step != expected.step:
        parts.append("no step")
    return ", ".join(parts)


def table(scratch: Path, first_tp: int = 2, second_tp: int = 3) -> list[str]:
    """Returns the rows of the table. Writes each source for ``first_tp`` ranks, cut along the
    vocabulary, and converts it to ``second_tp``."""
    save_model(scratch / "model.pt")
    expected = read(scratch / "model.pt", OPTIONS)
    rows = [
        "| from \\ to | " + " | ".join(f"`{name}`" for name in FORMATS) + " |",
        "|---" * (len(FORMATS) + 1) + "|",
    ]
    for first in FORMATS:
        source = scratch / f"{first}.pt"
        request = Request(to=first, tp_size=first_tp, dim="vocab", read=OPTIONS)
        convert(scratch / "model.pt", source, request)
        cells = []
        for second in FORMATS:
            output = scratch / f"{first}-{second}.pt"
            request = Request(to=second, tp_size=second_tp, read=OPTIONS)
            convert(source, output, request, verify=True)
            cells.append(carried(expected, read(output, OPTIONS)))
        rows.append(f"| `{first}` | " + " | ".join(cells) + " |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, help="the page to write the table to")
    args = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        text = "\n".join(table(Path(scratch))) + "\n"
    if args.markdown is None:
        print(text, end="")
    else:
        page = args.markdown.read_text()
        before, _, rest = page.partition(BEGIN)
        args.markdown.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
